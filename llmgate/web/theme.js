/** Light, dark, or as the system has it. Remembered, since it is no secret. */

import { fill, h, icon, mark } from "./dom.js";

const KEPT = "llmrack.theme";
const NEXT = { auto: "light", light: "dark", dark: "auto" };
const ICON = { auto: "auto", light: "sun", dark: "moon" };
const NAME = { auto: "as the system has it", light: "light", dark: "dark" };

/** The theme that was chosen, "auto" for none. */
export function chosen() {
  const kept = localStorage.getItem(KEPT);
  return kept in NEXT ? kept : "auto";
}

/** Show it. */
export function apply(theme = chosen()) {
  mark(document.documentElement, "data-theme", theme === "auto" ? null : theme);
}

/** The switch in the bar. @returns {{element: HTMLButtonElement, next: () => void}} */
export function themeSwitch() {
  const element = h("button", { class: "quiet icon", type: "button", onclick: next });
  function next() {
    const theme = NEXT[chosen()];
    localStorage.setItem(KEPT, theme);
    apply(theme);
    show();
  }
  function show() {
    const theme = chosen();
    fill(element, icon(ICON[theme]));
    element.setAttribute("aria-label", `Colours: ${NAME[theme]}. Change them`);
    element.setAttribute("title", `Colours: ${NAME[theme]} (t)`);
  }
  show();
  return { element, next };
}
