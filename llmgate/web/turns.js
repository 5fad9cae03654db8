/** One turn of a chat on the page: who said what, what came with it, and what may be done with it. */

import { figures } from "./chat.js";
import { fill, h, icon, mark } from "./dom.js";
import { count, duration, rate } from "./format.js";
import { markdown } from "./markdown.js";
import { copy } from "./states.js";

const WHO = { user: "You", assistant: "Model" };

/**
 * @param {import("./chat.js").Turn} turn
 * @param {{edit: (turn: any, text: string) => void, retry: (turn: any) => void, result: (turn: any) => void}} does
 */
export function turnView(turn, does) {
  const body = h("div", { class: "said" });
  const actions = h("div", { class: "acts" });
  const facts = h("div", { class: "facts" });
  const name = turn.role === "tool" ? `Result of ${turn.call.name}` : (turn.model ?? WHO[turn.role]);
  const element = h("article", { class: `turn ${turn.role}`, "aria-label": name }, h("div", { class: "row" }, h("h2", { class: "label" }, name), h("span", { class: "grow" }), actions), body, facts);
  let waits = 0;

  function draw() {
    const busy = ["asked", "answering"].includes(turn.facts?.state);
    mark(element, "aria-busy", busy ? "true" : null);
    mark(element, "data-state", turn.facts?.state);
    fill(body, content(turn, busy));
    fill(facts, told(turn, busy));
    fill(actions, busy ? null : [
      act("Edit", "edit", edit),
      turn.role === "tool" ? null : act(turn.role === "user" ? "Ask this again" : "Answer again", "again", () => does.retry(turn)),
      turn.content ? act("Copy", "copy", () => copy(turn.content, "Text")) : null,
    ]);
  }

  /** Once for all that comes within a frame. */
  function update() {
    waits ||= requestAnimationFrame(() => {
      waits = 0;
      draw();
    });
  }

  function edit() {
    const text = h("textarea", { "aria-label": `Text of ${name}`, rows: Math.min(14, turn.content.split("\n").length + 1), value: turn.content });
    const done = () => does.edit(turn, text.value);
    const form = h(
      "form",
      { class: "stack edit", onsubmit: (event) => { event.preventDefault(); done(); } },
      text,
      h("div", { class: "row" },
        h("button", { class: "main", type: "submit" }, turn.role === "user" ? "Send" : "Keep"),
        h("button", { type: "button", onclick: draw }, "Cancel"),
        h("span", { class: "soft small" }, turn.role === "user" ? "What follows it is asked for again." : "What follows it stays.")),
    );
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") draw();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
    });
    fill(body, form);
    fill(actions);
    text.focus();
    text.setSelectionRange(text.value.length, text.value.length);
  }

  draw();
  return { element, update, draw, edit };

  function act(label, picture, run) {
    return h("button", { class: "quiet icon", type: "button", "aria-label": label, title: label, onclick: run }, icon(picture));
  }
}

function content(turn, busy) {
  if (turn.role !== "assistant") return h("div", { class: "words" }, turn.content);
  const words = h("div", { class: "words markdown" }, markdown(turn.content));
  if (busy) (words.lastElementChild ?? words).append(h("span", { class: "caret", "aria-hidden": "true" }));
  return [
    turn.reasoning
      ? h("details", { class: "thought", open: busy && !turn.content }, h("summary", null, "Reasoning"), h("div", { class: "words" }, turn.reasoning))
      : null,
    turn.content || busy ? words : null,
    (turn.calls ?? []).map(call),
  ];
}

function call({ name, arguments: text }) {
  let shown = text;
  try {
    shown = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // Not whole yet, or not JSON.
  }
  return h("div", { class: "call" }, h("div", { class: "row" }, h("span", { class: "tag" }, "calls"), h("b", { class: "mono" }, name)), h("pre", { tabindex: "0" }, h("code", null, shown)));
}

/** What there is to know about an answer. */
function told(turn, busy) {
  const { facts } = turn;
  if (!facts) return null;
  const { firstToken, speed, prompt, cached, completion } = figures(facts);
  const parts = [];
  if (facts.nodes.length) parts.push(h("span", { class: facts.nodes.length > 1 ? "moved" : "", title: "The node that answered" }, `node ${facts.nodes.join(" → ")}`));
  if (firstToken !== null) parts.push(h("span", { title: "From the request to its first token" }, `first token ${duration(firstToken)}`));
  if (speed !== null) parts.push(h("span", { title: "From the first token on" }, `${rate(speed)} tokens/s`));
  if (prompt !== null) parts.push(h("span", { title: "Tokens of the prompt, and how many of them were not computed again" }, `prompt ${count(prompt)}, ${count(cached)} cached`));
  if (completion !== null) parts.push(h("span", null, `answer ${count(completion)}`));
  if (facts.finish === "length") parts.push(h("span", { class: "warn" }, "cut at max tokens"));
  if (facts.state === "stopped") parts.push(h("span", { class: "warn" }, "stopped"));
  if (facts.request) parts.push(h("button", { class: "quiet id mono", type: "button", title: `Copy the request id ${facts.request}`, onclick: () => copy(facts.request, "Request id") }, facts.request.slice(0, 12)));
  return [
    facts.nodes.length > 1 ? h("p", { class: "notice good" }, `The answer went on at ${facts.nodes.at(-1)} where ${facts.nodes.at(-2)} could not.`) : null,
    facts.error ? h("p", { class: "notice bad", role: "alert" }, facts.error) : null,
    facts.ignored && !busy ? h("p", { class: "notice warn" }, `Without effect here: ${facts.ignored}`) : null,
    parts.length ? h("p", { class: "figures" }, parts) : null,
  ];
}
