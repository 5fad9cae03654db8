/** The question for a key. It is tried at once, and stays in this tab. */

import { field, fill, h } from "./dom.js";

/**
 * @param {import("./api.js").Gate} gate
 * @param {HTMLElement} main
 * @param {string} why said above the question
 * @param {(who: any) => void} enter called with whom the key belongs to
 */
export function signIn(gate, main, why, enter) {
  const input = h("input", {
    type: "password", name: "key", autocomplete: "off", spellcheck: "false", autocapitalize: "off",
    placeholder: "sk-llmrack-…", required: true, class: "mono",
  });
  const key = field("API key", input, "Kept in this tab until you close it, and sent to this gate alone.");
  const button = h("button", { class: "main", type: "submit" }, "Open");
  const form = h(
    "form",
    { class: "signin panel", onsubmit: open, novalidate: true },
    h("div", { class: "row" }, h("img", { src: "console/mark.svg", alt: "", width: 28, height: 28 }), h("h1", null, "llmrack")),
    h("p", { class: "soft" }, "A key opens the playground; an admin key opens the fleet, the requests and the keys too."),
    why ? h("p", { class: "notice warn", role: "alert" }, why) : null,
    key.element,
    button,
    h("p", { class: "small soft" }, "The first key is made on the gate’s host: ", h("code", null, "llmgate keys create NAME --admin")),
    h("p", { class: "small" }, h("a", { href: "docs" }, "The API, described")),
  );
  fill(main, form);
  input.focus();

  async function open(event) {
    event.preventDefault();
    const secret = input.value.trim();
    if (!secret) return key.wrong("Paste a key.");
    // What cannot stand in a header would fail in the browser, with words that help nobody.
    if (!/^[\x21-\x7e]+$/.test(secret)) return key.wrong("A key is one word of plain letters, digits and signs.");
    button.disabled = true;
    key.wrong("");
    try {
      const who = await gate.ask("v1/key", { key: secret });
      gate.remember(secret);
      enter(who);
    } catch (error) {
      key.wrong(error.status === 401 ? "The gate does not know this key." : error.message);
      input.select();
    } finally {
      button.disabled = false;
    }
  }
}
