/** What the router would do with a request, and why: each node's figures, and how each policy ranks them. */

import { meter } from "./charts.js";
import { field, fill, h, mark } from "./dom.js";
import { count, duration, rate, several } from "./format.js";

/** @param {import("./api.js").Gate} gate */
export function explainPanel(gate) {
  const model = field("Model", h("select", { name: "model" }));
  const prompt = field("Message", h("textarea", { name: "prompt", rows: 2, placeholder: "As a client would send it" }));
  const system = field("System prompt", h("textarea", { name: "system", rows: 2, placeholder: "Optional: what a client’s requests begin with decides where they are in the cache" }));
  const result = h("div", { "aria-live": "polite" });
  const button = h("button", { class: "main", type: "submit" }, "Explain");
  const element = h(
    "section",
    { class: "panel explain", "aria-labelledby": "explain-title" },
    h("div", { class: "title" }, h("h2", { id: "explain-title" }, "What the router would do, and why"), h("span", { class: "soft small" }, "nothing is sent to a node")),
    h("form", { class: "inside", onsubmit: ask }, h("div", { class: "asked" }, model.element, prompt.element, system.element), h("div", { class: "row" }, button)),
    result,
  );
  let listed = "";

  function update(now) {
    const names = Object.keys(now.gate.policies);
    if (names.join() === listed) return;
    listed = names.join();
    const kept = model.input.value;
    fill(model.input, names.map((name) => h("option", { value: name, selected: name === kept }, `${name} (${now.gate.policies[name]})`)));
    button.disabled = !names.length;
  }

  async function ask(event) {
    event.preventDefault();
    const messages = [{ role: "user", content: prompt.input.value || "Hello" }];
    if (system.input.value) messages.unshift({ role: "system", content: system.input.value });
    mark(button, "disabled", true);
    try {
      const said = await gate.ask("admin/explain", { body: { path: "/v1/chat/completions", body: { model: model.input.value, messages } } });
      fill(result, told(said));
    } catch (error) {
      fill(result, h("div", { class: "inside" }, h("p", { class: "notice bad", role: "alert" }, error.message)));
    }
    mark(button, "disabled", null);
  }

  return { element, update, focus: () => prompt.input.focus() };
}

function told(said) {
  const first = said.policies.find((one) => one.policy === said.policy)?.ranking[0];
  const dearest = Math.max(1e-9, ...said.nodes.map((node) => node.cost_seconds));
  const words = first
    ? [h("b", null, first), ` would answer: the policy ${said.policy} ranks it first.`]
    : "No node can take this request now.";
  const prompt = said.prompt ? ` The prompt has ${several(said.prompt.bytes, "byte")} in ${several(said.prompt.blocks, "whole block")}.` : "";
  return [
    h("p", { class: "verdict" }, words, h("span", { class: "soft" }, prompt, said.notes.length ? ` ${said.notes.join(", ")}.` : "")),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        null,
        h("thead", null, h("tr", null, ["Node", "Busy", "Wait", "Backlog", "Prompt", "Cached", "Prefill/s", "Cost until the first token"].map((name, at) => h("th", { scope: "col", class: at && at < 7 ? "number" : "" }, name)))),
        h("tbody", null, said.nodes.map((node) => figures(node, dearest, node.node === first)), said.passed_over.map(passed)),
      ),
    ),
    said.nodes.length ? rankings(said) : null,
  ];
}

function figures(node, dearest, chosen) {
  const cost = meter(`Cost at ${node.node}`);
  cost.update((node.cost_seconds / dearest) * 0.84, duration(node.cost_seconds));
  return h(
    "tr",
    { class: chosen ? "chosen" : "" },
    h("th", { scope: "row" }, node.node),
    h("td", { class: "number" }, `${count(node.busy)}/${count(node.slots)}`),
    h("td", { class: "number" }, duration(node.wait_seconds)),
    h("td", { class: "number" }, count(node.backlog_tokens)),
    h("td", { class: "number" }, count(node.prompt_tokens)),
    h("td", { class: "number" }, count(node.cached_tokens)),
    h("td", { class: "number" }, rate(node.prefill_tokens_per_second)),
    h("td", null, h("span", { class: "cost" }, h("span", { class: "number" }, duration(node.cost_seconds)), cost.element)),
  );
}

function passed({ node, state, why }) {
  return h("tr", { class: "soft" }, h("th", { scope: "row" }, node), h("td", { colspan: 7 }, `${state}: ${why}`));
}

function rankings(said) {
  const rows = said.policies.map((one) => {
    const inForce = one.policy === said.policy;
    return h(
      "tr",
      { class: inForce ? "chosen" : "" },
      h("th", { scope: "row" }, one.policy, inForce ? h("span", { class: "tag in-force" }, "in force") : null),
      h("td", null, h("ol", { class: "ranking plain" }, one.ranking.map((name) => h("li", null, name)))),
      h("td", { class: "soft small" }, one.reason),
    );
  });
  const table = h("table", null, h("thead", null, h("tr", null, h("th", { scope: "col" }, "Policy"), h("th", { scope: "col" }, "Ranking, best first"), h("th", { scope: "col" }, "What decided"))), h("tbody", null, rows));
  return h("div", { class: "scroll" }, table);
}
