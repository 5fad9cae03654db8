/** What goes with the messages of a chat: model, system prompt, sampling, the form of the answer, tools. */

import { field, fill, h } from "./dom.js";
import { announce } from "./states.js";

/**
 * [field, label, least, most, step, default, hint]. Those in front are always in sight. An empty field is not sent, so
 * that the gate's and the node's own defaults hold.
 */
const FIRST = [
  ["temperature", "Temperature", 0, 2, 0.05, "1", "0: always the most probable token"],
  ["max_tokens", "Max tokens", 1, null, 1, "context", "Up to what the context holds, unless given"],
  ["top_p", "Top p", 0.01, 1, 0.01, "1", null],
  ["seed", "Seed", -1, 4294967294, 1, "random", null],
];
const MORE = [
  ["top_k", "Top k", -1, null, 1, "off", null],
  ["min_p", "Min p", 0, 1, 0.01, "off", null],
  ["typical_p", "Typical p", 0.01, 1, 0.01, "off", null],
  ["top_n_sigma", "Top n sigma", -1, 100, 0.1, "off", null],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "0", null],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "0", null],
  ["repeat_penalty", "Repeat penalty", 0.01, 10, 0.05, "1", null],
  ["repeat_last_n", "… among the last", -1, null, 1, "64", null],
  ["dry_multiplier", "DRY multiplier", 0, 100, 0.1, "off", null],
  ["xtc_probability", "XTC probability", 0, 1, 0.05, "off", null],
  ["thinking_budget_tokens", "Thinking budget", -1, null, 1, "none", null],
];
const TOOLS = [{ type: "function", function: { name: "get_weather", description: "The weather in a city now", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }];
const SCHEMA = { type: "object", properties: { answer: { type: "string" }, sure: { type: "boolean" } }, required: ["answer", "sure"] };

/** A text of the controls is not what it must be; the field says why. */
export class Unfit extends Error {}

/**
 * @param {import("./api.js").Gate} gate
 */
export function controls(gate) {
  const model = field("Model", h("select", { name: "model" }));
  const system = field("System prompt", h("textarea", { name: "system", rows: 3, placeholder: "None" }));
  const numbers = new Map([...FIRST, ...MORE].map((row) => [row[0], number(row)]));
  const stop = field("Stop", h("textarea", { name: "stop", rows: 1, class: "mono short", placeholder: "One text a line" }));
  const effort = field("Reasoning effort", select("reasoning_effort", ["", "none", "minimal", "low", "medium", "high", "xhigh"], "as the model has it"));
  const form = field("Form of the answer", select("form", ["text", "json_object", "json_schema"]));
  const schema = field("JSON schema", h("textarea", { name: "schema", rows: 7, class: "mono", spellcheck: "false", value: JSON.stringify(SCHEMA, null, 2) }), "The answer is held to it");
  const tools = field("Tools", h("textarea", { name: "tools", rows: 4, class: "mono", spellcheck: "false", placeholder: "A JSON list of functions" }), "You play the tools: type what a call returns");
  const choice = field("Tool choice", select("tool_choice", ["", "auto", "required", "none"], "auto"));
  const example = h("button", { class: "quiet small", type: "button", onclick: () => { tools.input.value = JSON.stringify(TOOLS, null, 2); tools.wrong(""); } }, "Put an example there");
  schema.element.hidden = true;
  form.input.addEventListener("change", () => { schema.element.hidden = form.input.value !== "json_schema"; });

  const element = h(
    "div",
    { class: "controls stack" },
    model.element,
    system.element,
    h("div", { class: "fields" }, FIRST.map(([name]) => numbers.get(name).element)),
    h("details", null, h("summary", null, "More sampling"), h("div", { class: "fields" }, MORE.map(([name]) => numbers.get(name).element), effort.element), stop.element),
    h("details", null, h("summary", null, "Form of the answer"), h("div", { class: "stack" }, form.element, schema.element)),
    h("details", null, h("summary", null, "Tools"), h("div", { class: "stack" }, tools.element, h("div", { class: "row" }, example), choice.element)),
  );

  /** What goes into a request, as it is now. Throws Unfit. */
  function options() {
    const said = { model: model.input.value };
    if (system.input.value.trim()) said.system = system.input.value;
    for (const [name, { input, wrong }] of numbers) {
      wrong(input.validity.valid ? "" : input.validationMessage);
      if (!input.validity.valid) throw unfit(input, `${name} is not in its range`);
      if (input.value !== "") said[name] = Number(input.value);
    }
    const stops = stop.input.value.split("\n").filter(Boolean);
    if (stops.length) said.stop = stops;
    if (effort.input.value) said.reasoning_effort = effort.input.value;
    if (form.input.value === "json_object") said.response_format = { type: "json_object" };
    if (form.input.value === "json_schema") said.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed(schema, (value) => value && typeof value === "object" && !Array.isArray(value), "an object") } };
    if (tools.input.value.trim()) {
      said.tools = parsed(tools, Array.isArray, "a list");
      if (choice.input.value) said.tool_choice = choice.input.value;
    }
    return said;
  }

  /** Ask which models there are. Throws Failure. */
  async function refresh() {
    const { data } = await gate.ask("v1/models");
    const chats = data.filter((one) => one.kinds.includes("chat"));
    const kept = model.input.value;
    fill(model.input, chats.map((one) => h("option", { value: one.id, selected: one.id === kept }, `${one.id} · ${(one.n_ctx / 1024).toFixed(one.n_ctx % 1024 ? 1 : 0)}K context`)));
    return chats.length;
  }

  return { element, options, refresh };
}

function number([name, label, least, most, step, standard, hint]) {
  return field(label, h("input", { type: "number", name, min: least, max: most, step: "any", "data-step": step, inputmode: "decimal", placeholder: standard, title: hint }), null);
}

function select(name, values, empty = "") {
  return h("select", { name }, values.map((value) => h("option", { value }, value || empty)));
}

function parsed({ input, wrong }, fits, what) {
  let value;
  try {
    value = JSON.parse(input.value);
  } catch (error) {
    wrong(error.message);
    throw unfit(input, "What stands there is not JSON");
  }
  wrong(fits(value) ? "" : `It must be ${what}.`);
  if (!fits(value)) throw unfit(input, `It must be ${what}`);
  return value;
}

function unfit(input, message) {
  const details = input.closest("details");
  if (details) details.open = true;
  const drawer = input.closest(".drawer");
  drawer?.classList.add("open");
  input.focus();
  announce(message);
  return new Unfit(message);
}
