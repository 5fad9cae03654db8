/** One node of the fleet, and what may be done with it: keep work away from it, and let it have work again. */

import { meter, sparkline } from "./charts.js";
import { dialog, field, fill, h, mark, s, say } from "./dom.js";
import { count, percent, rate, span } from "./format.js";
import { announce } from "./states.js";

const OWNER = "llmrack.owner";
const MOST_DOTS = 16;
const TONES = { ready: "good", draining: "warn", loading: "warn", starting: "warn", "half-open": "warn" };

/** @param {import("./api.js").Gate} gate */
export function nodeCard(gate) {
  const title = h("h2", { class: "cut" });
  const pill = h("span", { class: "pill" });
  const models = h("p", { class: "cut" });
  const place = h("p", { class: "soft small cut" });
  const why = h("p", { class: "notice small", hidden: true });
  const dots = h("span", { class: "dots", "aria-hidden": "true" });
  const slots = h("dd");
  const kv = h("dd");
  const kvMeter = meter("KV cache in use");
  const speed = h("b");
  const waiting = h("span", { class: "soft" });
  const line = sparkline("Tokens a second, the last 15 minutes", { height: 40 });
  const button = h("button", { type: "button", onclick: act });
  const element = h(
    "li",
    { class: "node panel" },
    h("div", { class: "row top" }, title, pill, h("span", { class: "grow" }), button),
    h("div", null, models, place),
    why,
    h("dl", { class: "loads" }, h("div", null, h("dt", null, "Slots"), slots, dots), h("div", null, h("dt", null, "KV cache"), kv, kvMeter.element)),
    h("div", { class: "speed" }, h("p", null, speed, h("span", { class: "soft" }, " tokens/s"), h("span", { class: "grow" }), waiting), line.element),
  );
  let node = null;
  let drawn = "";

  function draw(seen, samples, now) {
    node = seen;
    const load = node.load ?? {};
    const [tone, word] = standing(node);
    say(title, node.name);
    mark(title, "title", node.url);
    mark(pill, "class", `pill ${tone}`);
    say(pill, word);
    const served = node.models.map((model) => `${model.id}${model.state === "ready" ? "" : ` (${model.state})`}`).join(", ");
    say(models, served || "no model known");
    const labels = Object.entries(node.labels ?? {}).map(([name, value]) => `${name}=${value}`);
    say(place, [node.release ? `release ${node.release}` : node.url, ...labels].join(" · "));
    mark(place, "title", node.url);
    say(why, because(node));
    why.hidden = !why.textContent;
    mark(why, "class", `notice small ${node.lease ? "warn" : tone}`);
    mark(element, "data-state", tone);
    say(slots, node.load ? `${count(load.running)} of ${count(load.slots)}` : "–");
    drawDots(load.running ?? 0, load.slots ?? 0);
    const used = load.kv_cells ? load.kv_cells_used / load.kv_cells : 0;
    say(kv, node.load ? percent(used) : "–");
    mark(kv, "title", `${count(load.kv_cells_used ?? 0)} of ${count(load.kv_cells ?? 0)} cells`);
    kvMeter.update(used, kv.title);
    say(speed, node.load ? rate(load.running ? load.decode_tps : 0) : "–");
    say(waiting, load.waiting ? `${count(load.waiting)} waiting` : "");
    line.update(samples.at, samples.tokens_per_second, now.now);
    say(button, node.lease ? "Undrain" : "Drain");
    mark(button, "aria-label", `${node.lease ? "Undrain" : "Drain"} ${node.name}`);
  }

  function drawDots(running, all) {
    const wanted = `${running}/${all}`;
    if (wanted === drawn) return;
    drawn = wanted;
    const many = Math.min(all, MOST_DOTS);
    const full = all > MOST_DOTS ? Math.ceil((running / all) * MOST_DOTS) : running;
    const step = 200 / Math.max(1, many);
    fill(dots, s("svg", { viewBox: "0 0 200 6", preserveAspectRatio: "none", class: "meter" },
      Array.from({ length: many }, (_, at) => s("rect", { class: at < full ? "value" : "track", x: at * step, width: Math.max(1, step - 2.5), height: 6, rx: 1 }))));
  }

  function act() {
    if (node.lease) undrain(gate, node);
    else drain(gate, node);
  }

  return { element, update() {}, draw };
}

/** [tone, words] of a node. */
function standing(node) {
  if (node.lease && node.state === "ready") return ["warn", "drained"];
  const slow = node.usable && node.health.share < 1;
  return [TONES[node.state] ?? "bad", slow ? `ready, ${percent(node.health.share)} share` : node.state];
}

/** Why it takes no work, or by whose wish. */
function because(node) {
  const { lease } = node;
  if (!lease) return node.usable ? "" : node.why;
  const left = lease.ttl_seconds === null ? "until it is lifted" : `${span(lease.ttl_seconds)} left`;
  return `Drained by ${lease.owner}${lease.reason ? ` — ${lease.reason}` : ""} · ${left}`;
}

/** Ask for a lease. What the gate refuses may be forced, once it has said why. */
function drain(gate, node) {
  const owner = field("Owner", h("input", { name: "owner", value: localStorage.getItem(OWNER) ?? "", maxlength: 200, required: true, autocomplete: "off" }), "Who lifts it again");
  const reason = field("Reason", h("input", { name: "reason", maxlength: 200, autocomplete: "off", placeholder: "optional" }));
  const times = [["15 minutes", 900], ["1 hour", 3600], ["8 hours", 28800], ["Until it is lifted", ""]];
  const ttl = field("For", h("select", { name: "ttl" }, times.map(([name, seconds]) => h("option", { value: String(seconds) }, name))), "Running requests go on; new ones go elsewhere");
  const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
  const force = h("input", { type: "checkbox", name: "force" });
  const forced = h("label", { class: "check", hidden: true }, force, "Drain it all the same");
  dialog(`Drain ${node.name}`, (close) =>
    h(
      "form",
      {
        method: "dialog",
        async onsubmit(event) {
          event.preventDefault();
          const body = { owner: owner.input.value.trim(), force: force.checked };
          if (reason.input.value.trim()) body.reason = reason.input.value.trim();
          if (ttl.input.value) body.ttl_seconds = Number(ttl.input.value);
          try {
            await gate.ask(`admin/nodes/${encodeURIComponent(node.name)}/drain`, { body });
            localStorage.setItem(OWNER, body.owner);
            announce(`${node.name} gets no new work`);
            close();
          } catch (error) {
            say(wrong, error.message);
            wrong.hidden = false;
            forced.hidden = error.status !== 409;
          }
        },
      },
      owner.element, reason.element, ttl.element, wrong, forced,
      h("div", { class: "buttons" }, h("button", { type: "button", onclick: close }, "Cancel"), h("button", { class: "main", type: "submit" }, "Drain")),
    ),
  );
}

/** Give a lease back; one of somebody else only when it is said. */
function undrain(gate, node) {
  const { lease } = node;
  const wrong = h("p", { class: "notice bad", role: "alert", hidden: true });
  dialog(`Undrain ${node.name}`, (close) =>
    h(
      "form",
      {
        method: "dialog",
        async onsubmit(event) {
          event.preventDefault();
          try {
            await gate.ask(`admin/nodes/${encodeURIComponent(node.name)}/drain?owner=${encodeURIComponent(lease.owner)}`, { method: "DELETE" });
            announce(`${node.name} gets work again`);
            close();
          } catch (error) {
            say(wrong, error.message);
            wrong.hidden = false;
          }
        },
      },
      h("p", null, `${because(node)}.`),
      h("p", { class: "soft" }, "Lifting it is done in the owner’s name. Somebody may be at work on this host."),
      wrong,
      h("div", { class: "buttons" }, h("button", { type: "button", onclick: close }, "Cancel"), h("button", { class: "main", type: "submit" }, "Undrain")),
    ),
  );
}
