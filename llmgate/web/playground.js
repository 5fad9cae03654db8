/** A chat with a model: turns that can be edited and asked again, what goes with them, and the request as code. */

import { answer, request } from "./chat.js";
import { curl, python } from "./code.js";
import { Unfit, controls } from "./controls.js";
import { dialog, fill, h, icon, mark } from "./dom.js";
import { copy, failed, loading, state } from "./states.js";
import { turnView } from "./turns.js";

/** @param {import("./api.js").Gate} gate @returns {import("./main.js").Page} */
export function playgroundPage(gate) {
  /** @type {{turn: import("./chat.js").Turn, view: ReturnType<typeof turnView>}[]} */
  let chat = [];
  /** @type {AbortController | null} */
  let answering = null;
  const settings = controls(gate);
  const log = h("div", { class: "log", role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const text = h("textarea", { name: "message", rows: 1, "aria-label": "Message", placeholder: "Ask something", onkeydown: typed, oninput: grow });
  const send = h("button", { class: "main icon", type: "submit", "aria-label": "Send", title: "Send (Enter)" }, icon("send"));
  const results = h("div", { class: "results", hidden: true });
  const drawer = h("aside", { class: "drawer panel", "aria-label": "Settings of the request" }, settings.element);
  const toggle = h("button", { type: "button", class: "narrow", "aria-expanded": "false", onclick: () => mark(toggle, "aria-expanded", String(drawer.classList.toggle("open"))) }, "Settings");
  const talk = h(
    "div",
    { class: "talk" },
    log,
    results,
    h("form", { class: "composer panel", onsubmit: submit }, text, send),
  );
  const element = h(
    "section",
    { "aria-labelledby": "chat-title", class: "playground" },
    h("div", { class: "head" },
      h("h1", { id: "chat-title" }, "Playground"),
      h("div", { class: "actions" },
        toggle,
        h("button", { type: "button", onclick: () => code("curl", curl) }, "Copy as curl"),
        h("button", { type: "button", onclick: () => code("Python", python) }, "Copy as Python"),
        h("button", { type: "button", onclick: anew }, "New chat"))),
    h("div", { class: "two" }, talk, drawer),
  );
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && answering) answering.abort();
  });
  const does = {
    edit(turn, words) {
      turn.content = words;
      if (turn.role === "user") again(turn);
      else {
        view(turn).draw();
        text.focus();
      }
    },
    retry: again,
  };

  function show(turn) {
    const made = turnView(turn, does);
    if (!chat.length) fill(log);
    chat.push({ turn, view: made });
    log.append(made.element);
    return made;
  }

  function view(turn) {
    return chat.find((one) => one.turn === turn).view;
  }

  /** Ask again for what follows a turn of the user, or for a turn of the model itself. */
  function again(turn) {
    const at = chat.findIndex((one) => one.turn === turn);
    cut(turn.role === "assistant" ? at : at + 1);
    view(turn.role === "assistant" ? chat.at(-1).turn : turn).draw();
    ask();
  }

  function cut(length) {
    for (const { view: gone } of chat.splice(length)) gone.element.remove();
    fill(results);
    results.hidden = true;
  }

  async function ask() {
    let body;
    try {
      body = request(chat.map((one) => one.turn), settings.options());
    } catch (error) {
      if (error instanceof Unfit) return;
      throw error;
    }
    answering?.abort();
    const mine = (answering = new AbortController());
    const turn = { role: "assistant", content: "", model: body.model };
    const shown = show(turn);
    shown.element.scrollIntoView({ block: "nearest" });
    busy(true);
    await answer(gate, body, turn, mine.signal, () => {
      const below = atEnd();
      shown.update();
      if (below) requestAnimationFrame(() => scrollTo(0, document.documentElement.scrollHeight));
    });
    shown.draw();
    if (answering !== mine) return;
    answering = null;
    busy(false);
    if (turn.calls?.length && turn.facts.state === "done") askForResults(turn.calls);
  }

  /** The user is the tools: a field for what each call returns. */
  function askForResults(calls) {
    const inputs = calls.map((call, at) => h("textarea", { rows: 2, class: "mono", "aria-label": `What ${call.name} returns`, id: `result-${at}`, placeholder: '{"…": "…"}' }));
    fill(
      results,
      h("form", {
        class: "panel inside stack",
        onsubmit(event) {
          event.preventDefault();
          calls.forEach((call, at) => show({ role: "tool", content: inputs[at].value, call }));
          results.hidden = true;
          ask();
        },
      },
        h("h2", null, calls.length > 1 ? "What do these calls return?" : "What does this call return?"),
        calls.map((call, at) => h("div", { class: "field" }, h("label", { for: `result-${at}`, class: "mono" }, call.name), inputs[at])),
        h("div", { class: "row" }, h("button", { class: "main", type: "submit" }, "Return it"))),
    );
    results.hidden = false;
    inputs[0].focus();
  }

  function submit(event) {
    event.preventDefault();
    if (answering) return answering.abort();
    const words = text.value.trim();
    if (!words) return text.focus();
    try {
      settings.options();
    } catch (error) {
      if (error instanceof Unfit) return;
      throw error;
    }
    fill(results);
    results.hidden = true;
    show({ role: "user", content: words });
    text.value = "";
    grow();
    ask();
  }

  function typed(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!answering) submit(event);
    }
  }

  function grow() {
    text.rows = Math.min(10, text.value.split("\n").length);
  }

  function busy(is) {
    fill(send, icon(is ? "stop" : "send"));
    mark(send, "aria-label", is ? "Stop" : "Send");
    mark(send, "title", is ? "Stop (Esc)" : "Send (Enter)");
    mark(log, "aria-busy", String(is));
  }

  function anew() {
    answering?.abort();
    answering = null;
    cut(0);
    busy(false);
    empty();
    text.focus();
  }

  function empty() {
    fill(log, state("Ask the fleet something", "The gate sends it to the node where its first token comes soonest. Answers show who wrote them, how fast, and how much of the prompt was there already."));
  }

  function code(name, write) {
    let body;
    try {
      body = request([...chat.map((one) => one.turn), ...(text.value.trim() ? [{ role: "user", content: text.value.trim() }] : [])], settings.options());
    } catch (error) {
      if (error instanceof Unfit) return;
      throw error;
    }
    while (body.messages.at(-1)?.role === "assistant") body.messages.pop();
    if (!body.messages.some((one) => one.role !== "system")) body.messages.push({ role: "user", content: "Hello" });
    const written = write(new URL(".", document.baseURI).href.replace(/\/$/, ""), body);
    dialog(`The request as ${name}`, (close) =>
      h("div", { class: "body" },
        h("p", { class: "soft" }, "The key is read from ", h("code", null, "LLMRACK_KEY"), "."),
        h("pre", { class: "code", tabindex: "0" }, h("code", null, written)),
        h("div", { class: "buttons" }, h("button", { type: "button", onclick: close }, "Close"), h("button", { type: "button", class: "main", onclick: () => { copy(written, name); close(); } }, "Copy"))));
  }

  async function models() {
    try {
      if (await settings.refresh()) return chat.length || empty();
      fill(log, state("There is nobody to ask", "No node of this fleet serves a model for chats that this key may use.", ["Look again", models]));
    } catch (error) {
      if (!chat.length) fill(log, failed(error, models));
    }
  }

  fill(log, loading(1));
  return {
    id: "playground",
    name: "Playground",
    title: "Playground",
    element,
    show() {
      models();
      if (matchMedia("(min-width: 52rem)").matches) text.focus();
    },
    hide() {},
    shortcut(key) {
      if (key === "/") text.focus();
      else if (key === "n") anew();
      else return false;
      return true;
    },
  };
}

/** Whether the reader is at the end, and wants to stay there. */
function atEnd() {
  const page = document.documentElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < 120;
}
