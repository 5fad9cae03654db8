/** The keys: who has one, what it may use and has used of it; and to make, change and end them. */

import { meter } from "./charts.js";
import { dialog, fill, h, say } from "./dom.js";
import { brief, count, date } from "./format.js";
import { LIMITS, keyForm } from "./keyform.js";
import { announce, copy, failed, loading, state } from "./states.js";

/** @param {import("./api.js").Gate} gate */
export function keysPanel(gate) {
  const content = h("div", null, h("div", { class: "inside" }, loading(1)));
  const all = h("input", { type: "checkbox", onchange: draw });
  const element = h(
    "section",
    { class: "panel", "aria-labelledby": "keys-title" },
    h("div", { class: "title" },
      h("h2", { id: "keys-title" }, "Keys"), h("span", { class: "grow" }),
      h("label", { class: "check small soft" }, all, "Revoked ones too"),
      h("button", { class: "main", type: "button", onclick: create }, "New key")),
    content,
  );
  let keys = [];

  async function load() {
    try {
      ({ keys } = await gate.ask("admin/keys"));
      draw();
    } catch (error) {
      fill(content, h("div", { class: "inside" }, failed(error, load)));
    }
  }

  function draw() {
    const seen = keys.filter((key) => all.checked || !key.revoked);
    if (!seen.length) return fill(content, state("There are no keys yet", "A program, a person or a team gets one each, with limits of its own.", ["New key", create]));
    fill(content, h("div", { class: "scroll" }, h("table", { class: "keytable" },
      h("thead", null, h("tr", null, ["Name", "Role", "Models", "Limits, and what is used of them", "Expires", ""].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, seen.map(line)))));
  }

  function line(key) {
    const limits = LIMITS.filter(([name]) => key.limits?.[name] !== null && key.limits?.[name] !== undefined);
    return h(
      "tr",
      { class: key.revoked ? "soft" : "" },
      h("th", { scope: "row" }, h("span", null, key.name), key.owner ? h("div", { class: "soft small" }, key.owner) : null),
      h("td", null, h("span", { class: "tag" }, key.role ?? (key.admin ? "admin" : "user")), key.priority && key.priority !== "normal" ? h("span", { class: "tag" }, key.priority) : null),
      h("td", { "data-name": "Models" }, key.models.length ? key.models.join(", ") : h("span", { class: "soft" }, "all")),
      h("td", { "data-name": "Limits" }, limits.length ? h("div", { class: "limits" }, limits.map(([name, short]) => limit(short, key.limits[name], key.use?.[name]))) : h("span", { class: "soft" }, "none")),
      h("td", { "data-name": "Expires" }, key.revoked ? h("span", { class: "bad" }, `revoked ${date(key.revoked)}`) : expiry(key)),
      h("td", { class: "number" }, key.revoked ? null : [
        h("button", { class: "quiet", type: "button", "aria-label": `Edit ${key.name}`, onclick: () => edit(key) }, "Edit"),
        h("button", { class: "quiet danger", type: "button", "aria-label": `Revoke ${key.name}`, onclick: () => revoke(key) }, "Revoke")]),
    );
  }

  function create() {
    keyForm(gate, null, (made) => {
      load();
      secret(made);
    });
  }

  function edit(key) {
    keyForm(gate, key, () => {
      announce(`${key.name} is changed`);
      load();
    });
  }

  function revoke(key) {
    const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
    dialog(`Revoke ${key.name}`, (close) => h("form", {
      method: "dialog",
      async onsubmit(event) {
        event.preventDefault();
        try {
          await gate.ask(`admin/keys/${encodeURIComponent(key.name)}`, { method: "DELETE" });
          close();
          announce(`${key.name} is revoked`);
          load();
        } catch (error) {
          say(wrong, error.message);
          wrong.hidden = false;
        }
      },
    },
      h("p", null, "Whoever uses it is refused within a second. It cannot be taken back."),
      wrong,
      h("div", { class: "buttons" }, h("button", { type: "button", onclick: close }, "Cancel"), h("button", { class: "main", type: "submit" }, "Revoke"))));
  }

  return { element, load, create };
}

/** A secret that the gate will never tell again. */
function secret(made) {
  dialog(`The key of ${made.name}`, (close) => h("div", { class: "body" },
    h("p", null, "This is the only time that it is shown: the gate keeps a hash of it alone."),
    h("div", { class: "secret" }, h("code", null, made.secret), h("button", { class: "main", type: "button", onclick: () => copy(made.secret, "Key") }, "Copy")),
    h("div", { class: "buttons" }, h("button", { type: "button", onclick: close }, "I have it"))));
}

function limit(name, most, used) {
  const label = h("span", { class: "soft small" }, name);
  // Nobody counts for a key that is over, or while the counters cannot be asked.
  if (used === undefined || used === null) return h("div", { class: "limit" }, label, h("span", { class: "small number" }, brief(most)));
  const bar = meter(name);
  const both = `${count(used)} of ${count(most)}`;
  bar.update(most ? used / most : 1, both);
  return h("div", { class: "limit" }, label, h("span", { class: "small number", title: both }, `${brief(used)} / ${brief(most)}`), bar.element);
}

function expiry(key) {
  if (!key.expires) return h("span", { class: "soft" }, "never");
  const over = new Date(key.expires) < new Date();
  return h("span", { class: over ? "bad" : "" }, `${over ? "expired " : ""}${date(key.expires)}`);
}
