/**
 * Where the console begins: who is it, which pages may they see, and which one is shown. Pages are made once for a key
 * and keep what is in them while another one is shown.
 *
 * @typedef {{
 *   id: string, name: string, title: string,
 *   element: HTMLElement,
 *   show: () => void,
 *   hide: () => void,
 *   shortcut?: (key: string) => boolean,
 * }} Page
 */

import { Gate } from "./api.js";
import { fleetPage } from "./fleet.js";
import { playgroundPage } from "./playground.js";
import { requestsPage } from "./requests.js";
import { Shell } from "./shell.js";
import { signIn } from "./signin.js";
import { announce } from "./states.js";
import { apply } from "./theme.js";
import { usagePage } from "./usage.js";

apply();
const keysWanted = document.querySelector('meta[name="llmrack-keys"]').getAttribute("content") !== "none";
const gate = new Gate();
const shell = new Shell(gate, start);
/** @type {Page[]} */
let pages = [];
/** @type {Page | null} */
let current = null;

gate.addEventListener("refused", () => {
  if (pages.length) start("The gate no longer takes this key: it was revoked, or it has expired.");
});
addEventListener("hashchange", route);
document.addEventListener("keydown", shortcut);
start();

/**
 * Find out who it is: with the key at hand, without one where the gate wants none, and else by asking.
 * @param {string} [why] what to say above the question
 */
async function start(why = "") {
  leave();
  if (why) gate.forget();
  try {
    const who = gate.key || !keysWanted ? await gate.ask("v1/key") : null;
    if (who) return enter(who);
  } catch (error) {
    if (error.status === 401) {
      gate.forget();
      why ||= "The gate does not know this key any more.";
    } else {
      return shell.problem(error, () => start());
    }
  }
  shell.signedOut();
  signIn(gate, shell.main, why, enter);
}

/** @param {{name: string, role: string, models: string[], anonymous: boolean, admin_api: boolean}} who */
function enter(who) {
  const playground = playgroundPage(gate, who);
  const admin = who.role === "admin" && who.admin_api;
  pages = admin ? [fleetPage(gate), playground, requestsPage(gate), usagePage(gate)] : [playground];
  shell.signedIn(who, pages);
  route();
  if (who.role === "admin" && !admin) announce("The admin API of this gate has an address of its own: the other pages are there.");
}

function leave() {
  current?.hide();
  current = null;
  pages = [];
}

/** Show the page that the address names. */
function route() {
  if (!pages.length) return;
  const id = location.hash.replace(/^#\/?/, "").split("/")[0];
  const page = pages.find((one) => one.id === id) ?? pages[0];
  if (page === current) return;
  current?.hide();
  current = page;
  shell.show(page);
  page.show();
}

/** @param {KeyboardEvent} event */
function shortcut(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const target = /** @type {HTMLElement} */ (event.target);
  if (target.matches("input, textarea, select, [contenteditable]")) return;
  const at = "123456789".indexOf(event.key);
  if (at >= 0 && pages[at]) location.hash = `#/${pages[at].id}`;
  else if (event.key === "?") shell.help(pages);
  else if (event.key === "t") shell.theme.next();
  else if (!current?.shortcut?.(event.key)) return;
  event.preventDefault();
}
