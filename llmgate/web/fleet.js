/** The fleet as it is now: the sum of it, every node, and what the router would do. Live, once a second. */

import { sparkline } from "./charts.js";
import { fill, h, keep, mark, say } from "./dom.js";
import { explainPanel } from "./explain.js";
import { brief, count, percent, rate, several } from "./format.js";
import { nodeCard } from "./node.js";
import { failed, loading, state } from "./states.js";
import { Trail, summed } from "./trail.js";

/** @param {import("./api.js").Gate} gate @returns {import("./main.js").Page} */
export function fleetPage(gate) {
  const live = h("span", { class: "pill live" }, "Connecting");
  const about = h("span", { class: "soft small" });
  const tiles = TILES.map(tile);
  const nodes = h("ul", { class: "nodes plain", "aria-label": "Nodes" });
  const explain = explainPanel(gate);
  const content = h("div", { class: "stack" }, loading(2));
  const element = h(
    "section",
    { "aria-labelledby": "fleet-title" },
    h("div", { class: "head" }, h("h1", { id: "fleet-title" }, "Fleet"), live, h("div", { class: "actions" }, about)),
    content,
  );
  const cards = new Map();
  const trail = new Trail();
  let shown = false;
  /** @type {AbortController | null} */
  let following = null;

  function said(now) {
    trail.add(now.history, now.now);
    say(about, `${now.gate.host} · release ${now.gate.release} · ${several(now.gate.workers, "worker")}`);
    if (!shown) {
      shown = true;
      fill(content, h("div", { class: "tiles" }, tiles.map((one) => one.element)), nodes, explain.element);
    }
    tiles.forEach((one) => one.update(now, trail));
    keep(nodes, cards, now.nodes, (node) => node.name, () => nodeCard(gate));
    for (const node of now.nodes) cards.get(node.name).draw(node, trail.of(node.name), now);
    explain.update(now);
  }

  function stand(word, failure) {
    mark(live, "class", `pill ${word === "live" ? "good live" : "warn"}`);
    say(live, word === "live" ? "Live" : "Reconnecting");
    if (shown || !failure) return;
    if (failure.offline) fill(content, state("Waiting for the gate", "It does not answer; the fleet appears as soon as it does."));
    else fill(content, failed(failure, restart));
  }

  function restart() {
    page.hide();
    page.show();
  }

  const page = {
    id: "fleet",
    name: "Fleet",
    title: "Fleet",
    element,
    show() {
      following = new AbortController();
      gate.follow("admin/fleet/events", following.signal, { said, state: stand });
    },
    hide() {
      following?.abort();
    },
    shortcut(key) {
      if (key !== "/" || !shown) return false;
      explain.focus();
      return true;
    },
  };
  return page;
}

/**
 * The figures of the whole fleet: a name, the value in large, what stands behind it, and its last quarter of an hour.
 */
const TILES = [
  {
    name: "Nodes taking work",
    value: (now) => [count(now.nodes.filter((node) => node.usable).length), `of ${count(now.nodes.length)}`],
    series: null,
    note: (now) => Object.entries(tally(now.nodes.filter((node) => !node.usable).map(reason))).map(([why, n]) => `${n} ${why}`).join(", ") || "all are ready",
  },
  {
    name: "Requests running",
    value: (now) => [count(sum(now, "running")), `in ${several(sum(now, "slots"), "slot")}`],
    series: "running",
  },
  {
    name: "Requests waiting",
    value: (now) => [count(sum(now, "waiting") + queued(now)), queued(now) ? `${count(queued(now))} at the gate` : "at nodes"],
    series: "waiting",
  },
  {
    name: "Tokens a second",
    value: (now) => [rate(now.nodes.reduce((all, node) => all + (node.load?.running ? node.load.decode_tps : 0), 0)), ""],
    series: "tokens_per_second",
  },
  {
    name: "KV cache in use",
    value: (now) => [percent(sum(now, "kv_cells_used") / (sum(now, "kv_cells") || 1)), `of ${brief(sum(now, "kv_cells"))} cells`],
    series: "kv_used",
    top: 1,
    mean: true,
  },
];

function tile({ name, value, series, note, top, mean }) {
  const large = h("b");
  const rest = h("span", { class: "soft small" });
  const line = series ? sparkline(`${name}, the last 15 minutes`, { height: 34 }) : null;
  const said = note ? h("p", { class: "soft small" }) : null;
  const element = h("div", { class: "tile panel" }, h("h2", { class: "label" }, name), h("p", null, large, " ", rest), line?.element, said);
  return {
    element,
    update(now, trail) {
      const [first, second] = value(now);
      say(large, first);
      say(rest, second);
      if (said) say(said, note(now));
      if (line) {
        const all = summed(trail.all(), series, { mean });
        line.update(all.at, all.values, now.now, top);
      }
    },
  };
}

function sum(now, figure) {
  return now.nodes.reduce((all, node) => all + (node.load?.[figure] ?? 0), 0);
}

function queued(now) {
  return Object.values(now.queue).reduce((all, length) => all + length, 0);
}

function reason(node) {
  return node.lease ? "drained" : node.state;
}

function tally(words) {
  const found = {};
  for (const word of words) found[word] = (found[word] ?? 0) + 1;
  return found;
}
