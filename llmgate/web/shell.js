/** What stands around every page: the bar, the banner while the gate is away, short messages, the list of shortcuts. */

import { add, dialog, fill, h, icon, mark, say } from "./dom.js";
import { span } from "./format.js";
import { state } from "./states.js";
import { themeSwitch } from "./theme.js";

const TOAST_MS = 3500;

export class Shell {
  /**
   * @param {import("./api.js").Gate} gate
   * @param {(why?: string) => void} start begins anew, as after signing out
   */
  constructor(gate, start) {
    this.gate = gate;
    this.start = start;
    this.main = document.getElementById("main");
    this.bar = document.getElementById("bar");
    this.banner = document.getElementById("banner");
    this.theme = themeSwitch();
    gate.addEventListener("offline", () => this.#away());
    gate.addEventListener("online", () => this.#back());
    document.addEventListener("llmrack:say", (event) => this.#toast(event.detail));
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      this.main.focus();
    });
  }

  /** The bar of somebody who is known. @param {import("./main.js").Page[]} pages */
  signedIn(who, pages) {
    const links = pages.map((page) => h("a", { href: `#/${page.id}`, "data-page": page.id }, page.name));
    fill(
      this.bar,
      h("a", { class: "brand", href: `#/${pages[0].id}` }, h("img", { src: "console/mark.svg", alt: "" }), "llmrack"),
      h("nav", { "aria-label": "Pages" }, links),
      h(
        "div",
        { class: "tools" },
        h("span", { class: "who", title: `${who.name}: ${who.role}` }, h("b", { class: "cut" }, who.name), h("span", { class: "tag wide" }, who.role)),
        h("a", { class: "button quiet wide", href: "docs", target: "_blank", rel: "noopener" }, "API"),
        this.theme.element,
        h("button", { class: "quiet icon wide", type: "button", "aria-label": "Shortcuts", title: "Shortcuts (?)", onclick: () => this.help(pages) }, icon("help")),
        who.anonymous
          ? null
          : h("button", { class: "quiet icon", type: "button", "aria-label": "Forget the key", title: "Forget the key", onclick: () => this.#leave() }, icon("leave")),
      ),
    );
  }

  signedOut() {
    document.title = "llmrack";
    fill(this.bar);
    fill(this.main);
  }

  /** @param {import("./main.js").Page} page */
  show(page) {
    document.title = `${page.title} · llmrack`;
    for (const link of this.bar.querySelectorAll("nav a")) {
      mark(link, "aria-current", link.dataset.page === page.id ? "page" : null);
    }
    fill(this.main, page.element);
    scrollTo(0, 0);
  }

  /** The gate could not even say who it is. */
  problem(error, again) {
    fill(this.bar);
    const text = error.offline ? "The gate does not answer. This page tries again as soon as it does." : error.message;
    fill(this.main, state("This gate cannot be used now", text, ["Try again", again]));
    if (error.offline) this.gate.addEventListener("online", again, { once: true });
  }

  help(pages) {
    const keys = [
      ...pages.map((page, at) => [String(at + 1), page.title]),
      ["/", "Go to the filter, or to the message"],
      ["n", "New: a chat, or a key"],
      ["t", "Light, dark, or as the system has it"],
      ["Enter", "Send the message (Shift+Enter: a new line)"],
      ["Esc", "Stop the answer, close what is open"],
      ["?", "This list"],
    ];
    dialog("Shortcuts", (close) =>
      h(
        "div",
        { class: "body" },
        h("dl", { class: "keys" }, keys.map(([key, what]) => [h("dt", null, h("kbd", null, key)), h("dd", null, what)])),
        h("div", { class: "buttons" }, h("button", { type: "button", onclick: close, autofocus: true }, "Close")),
      ),
    );
  }

  #leave() {
    this.gate.forget();
    this.start();
  }

  #away() {
    const since = h("span", { class: "number" });
    const tick = () => {
      if (!this.gate.offlineSince) return;
      say(since, span((Date.now() - this.gate.offlineSince) / 1000));
      setTimeout(tick, 1000);
    };
    fill(this.banner, h("span", null, "The gate cannot be reached. What you see may be old; trying again."), since);
    this.main.classList.add("stale");
    tick();
  }

  #back() {
    fill(this.banner);
    this.main.classList.remove("stale");
  }

  #toast(text) {
    const toast = document.getElementById("toast");
    fill(toast);
    add(toast, text);
    toast.classList.add("shown");
    clearTimeout(this.timer);
    this.timer = setTimeout(() => toast.classList.remove("shown"), TOAST_MS);
  }
}
