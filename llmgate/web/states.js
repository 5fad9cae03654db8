/** What a page shows when it has nothing to show yet, or cannot; and short messages. */

import { h } from "./dom.js";

/**
 * A heading, a sentence and perhaps one thing to do.
 * @param {string} title @param {unknown} text @param {[string, () => void] | null} [action]
 */
export function state(title, text, action = null) {
  return h(
    "div",
    { class: "state" },
    h("h2", null, title),
    h("p", null, text),
    action ? h("button", { type: "button", onclick: action[1] }, action[0]) : null,
  );
}

/** Something is on its way. @param {number} lines */
export function loading(lines = 3) {
  const parts = Array.from({ length: lines }, () => h("span", { class: "skeleton tall" }));
  return h("div", { class: "stack", role: "status", "aria-label": "Loading" }, parts);
}

/** It did not come. @param {Error} error @param {() => void} again */
export function failed(error, again) {
  return state("This could not be loaded", error.message, ["Try again", again]);
}

/** Say something in passing. @param {string} text */
export function announce(text) {
  document.dispatchEvent(new CustomEvent("llmrack:say", { detail: text }));
}

/** Copy, and say so. @param {string} text @param {string} what */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    announce(`${what} copied`);
  } catch {
    // Without TLS browsers have no clipboard for pages; a selection can be copied by hand.
    byHand(text);
  }
}

function byHand(text) {
  const area = h("textarea", { class: "unseen", value: text, readonly: true, "aria-hidden": "true" });
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  announce(copied ? "Copied" : "The browser does not let this page copy");
}
