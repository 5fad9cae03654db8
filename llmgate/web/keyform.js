/** The form of a key: a new one, or what may be changed of one that is there. */

import { dialog, field, h, say } from "./dom.js";

/** [field of the API, short name, label]. */
export const LIMITS = [
  ["requests_per_minute", "requests/min", "Requests a minute"],
  ["tokens_per_minute", "tokens/min", "Tokens a minute"],
  ["concurrent_requests", "at once", "Requests at once"],
  ["tokens_per_day", "tokens/day", "Tokens a day"],
  ["tokens_per_month", "tokens/month", "Tokens a month"],
];

/**
 * @param {import("./api.js").Gate} gate
 * @param {any} key null for a new one
 * @param {(saved: any) => void} done
 */
export function keyForm(gate, key, done) {
  const ends = key?.expires ? local(key.expires) : "";
  const name = field("Name", h("input", { name: "name", required: true, maxlength: 64, pattern: "[A-Za-z0-9][A-Za-z0-9._@\\-]*", autocomplete: "off", spellcheck: "false", title: "Letters, digits and . _ @ -" }), "Who or what uses it");
  const owner = field("Owner", h("input", { name: "owner", maxlength: 200, autocomplete: "off", value: key?.owner ?? "" }), "Who answers for it");
  const role = choice("Role", "role", ["user", "admin"], key?.role ?? "user");
  const priority = choice("Priority", "priority", ["high", "normal", "low"], key?.priority ?? "normal");
  const models = field("Models", h("input", { name: "models", autocomplete: "off", spellcheck: "false", placeholder: "all", value: (key?.models ?? []).join(", ") }), "Names, with commas between them");
  const expires = field("Expires", h("input", { name: "expires", type: "datetime-local", value: ends }), "Never, if empty");
  const limits = LIMITS.map(([id, , label]) => [id, field(label, h("input", { name: id, type: "number", min: 1, step: 1, inputmode: "numeric", placeholder: "no limit", value: key?.limits?.[id] ?? "" }))]);
  const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
  const button = h("button", { class: "main", type: "submit" }, key ? "Save" : "Create");

  function said() {
    const body = {
      owner: owner.input.value.trim(),
      role: role.input.value,
      priority: priority.input.value,
      models: models.input.value.split(",").map((one) => one.trim()).filter(Boolean),
      limits: Object.fromEntries(limits.map(([id, { input }]) => [id, input.value === "" ? null : Number(input.value)])),
    };
    if (!key) body.name = name.input.value.trim();
    // What is over may stay as it is, and cannot be set.
    if (expires.input.value !== ends) body.expires_at = expires.input.value ? new Date(expires.input.value).toISOString() : null;
    return body;
  }

  dialog(key ? `Edit ${key.name}` : "New key", (close) =>
    h(
      "form",
      {
        method: "dialog",
        async onsubmit(event) {
          event.preventDefault();
          button.disabled = true;
          try {
            const saved = key
              ? await gate.ask(`admin/keys/${encodeURIComponent(key.name)}`, { method: "PATCH", body: said() })
              : await gate.ask("admin/keys", { body: said() });
            close();
            done(saved);
          } catch (error) {
            say(wrong, error.message);
            wrong.hidden = false;
            button.disabled = false;
          }
        },
      },
      h("div", { class: "fields" }, key ? null : name.element, owner.element),
      h("div", { class: "fields" }, role.element, priority.element, expires.element),
      models.element,
      h("fieldset", null, h("legend", { class: "label" }, "Limits"), h("div", { class: "fields" }, limits.map(([, one]) => one.element))),
      wrong,
      h("div", { class: "buttons" }, h("button", { type: "button", onclick: close }, "Cancel"), button),
    ),
  );
}

function choice(label, name, values, chosen) {
  return field(label, h("select", { name }, values.map((value) => h("option", { value, selected: value === chosen }, value))));
}

/** A moment as a field for date and time takes it, in the zone of the browser. */
function local(iso) {
  const when = new Date(iso);
  return new Date(when.getTime() - when.getTimezoneOffset() * 60e3).toISOString().slice(0, 16);
}
