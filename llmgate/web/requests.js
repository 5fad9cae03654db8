/** The requests as they end, the newest first; narrowed down by filters; one opened shows its way. */

import { add, fill, h, keep, mark, say } from "./dom.js";
import { count, duration, moment } from "./format.js";
import { announce, failed, loading, state } from "./states.js";
import { facts, strip, waterfall } from "./waterfall.js";

const MOST = 300;
const WORTH_A_MEAN = 20;
const ENDS = {
  "": () => true,
  done: (row) => row.end === "done",
  failed: (row) => row.status >= 400 && row.status !== 499,
  left: (row) => row.status === 499 || row.end === "client_left",
  moved: (row) => row.resumed > 0,
};

/** @param {import("./api.js").Gate} gate @returns {import("./main.js").Page} */
export function requestsPage(gate) {
  /** @type {any[]} newest first */
  let rows = [];
  let loaded = false;
  /** @type {AbortController | null} */
  let following = null;
  const live = h("span", { class: "pill live" }, "Connecting");
  const summary = h("span", { class: "soft small" });
  const filters = Object.fromEntries(["key", "model", "node"].map((name) => [name, filter(name)]));
  const ends = h("select", { "aria-label": "How it ended", onchange: draw }, [["", "However it ended"], ["done", "Done"], ["failed", "Failed"], ["left", "Client left"], ["moved", "Moved to another node"]].map(([value, name]) => h("option", { value }, name)));
  const known = new Map();
  const head = h("thead", null, h("tr", null, [["Ended", ""], ["Key", ""], ["Model", ""], ["Node", ""], ["Status", ""], ["Prompt", "number"], ["Cached", "number"], ["Answer", "number"], ["First token", "number"], ["Duration", "number"], ["", "strip"]].map(([name, kind]) => h("th", { scope: "col", class: kind }, name))));
  const list = h("table", { class: "requests" }, head);
  const table = h("div", { class: "panel scroll" }, list);
  const content = h("div", null, loading(1));
  const element = h(
    "section",
    { "aria-labelledby": "requests-title" },
    h("div", { class: "head" }, h("h1", { id: "requests-title" }, "Requests"), live, h("div", { class: "actions" }, summary)),
    h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() }, Object.values(filters).map((one) => one.element), ends),
    content,
  );

  function filter(name) {
    const list = h("datalist", { id: `known-${name}s` });
    const input = h("input", { type: "search", name, list: list.id, "aria-label": `Only this ${name}`, placeholder: `Any ${name}`, autocomplete: "off", oninput: later });
    return { element: h("div", null, input, list), input, list };
  }

  let timer = 0;
  function later() {
    draw();
    clearTimeout(timer);
    timer = setTimeout(load, 400);
  }

  /** What the filters leave of the rows at hand. */
  function matching() {
    const words = Object.entries(filters).map(([name, { input }]) => [name, input.value.trim().toLowerCase()]).filter(([, word]) => word);
    return rows.filter((row) => ENDS[ends.value](row) && words.every(([name, word]) => String(row[name] ?? "").toLowerCase().includes(word)));
  }

  /** The rows that the gate has for these filters; what one of them names in full it looks up itself. */
  async function load() {
    const query = new URLSearchParams({ limit: String(MOST) });
    for (const [name, { input, list }] of Object.entries(filters)) {
      const word = input.value.trim();
      if (word && [...list.options].some((option) => option.value === word)) query.set(name, word);
    }
    try {
      const { requests } = await gate.ask(`admin/requests?${query}`);
      if (!loaded) rows = requests;
      else join(requests);
      loaded = true;
      draw();
      return true;
    } catch (error) {
      if (loaded) announce(error.message);
      else if (error.status === 404) fill(content, state("This gate keeps no requests", "The setting usage is off, so only the request log has them."));
      else fill(content, failed(error, start));
      return false;
    }
  }

  function join(more) {
    const have = new Set(rows.map((row) => row.id));
    rows = [...more.filter((row) => !have.has(row.id)), ...rows].sort((a, b) => b.id - a.id).slice(0, MOST);
  }

  function draw() {
    if (!loaded) return;
    const seen = matching();
    for (const [name, { list }] of Object.entries(filters)) {
      const values = [...new Set(rows.map((row) => row[name]).filter(Boolean))].sort();
      if (values.join() !== [...list.options].map((option) => option.value).join()) fill(list, values.map((value) => h("option", { value })));
    }
    say(summary, sums(seen));
    if (!seen.length) {
      known.clear();
      fill(list, head);
      return fill(content, rows.length
        ? state("No request is like that", "None of the latest requests passes these filters.", ["Clear the filters", clear])
        : state("No requests yet", "They appear here as they end. Ask something in the playground, or point a client at this gate."));
    }
    if (content.firstChild !== table) fill(content, table);
    // A few that took very long would make specks of all the others.
    const times = seen.map((row) => row.duration_seconds ?? 0).sort((a, b) => a - b);
    const longest = times[Math.floor(times.length * 0.9)];
    keep(list, known, seen, (row) => row.id, line, head);
    for (const row of seen) known.get(row.id).scale(longest);
  }

  function clear() {
    for (const { input } of Object.values(filters)) input.value = "";
    ends.value = "";
    load();
    draw();
  }

  async function start() {
    following?.abort();
    const mine = (following = new AbortController());
    if (!(await load()) || mine.signal.aborted) return;
    gate.follow("admin/requests/events", mine.signal, {
      said(row) {
        join([row]);
        draw();
      },
      state(word) {
        mark(live, "class", `pill ${word === "live" ? "good live" : "warn"}`);
        say(live, word === "live" ? "Live" : "Reconnecting");
        if (word !== "live") load();
      },
    });
    mark(live, "class", "pill good live");
    say(live, "Live");
  }

  return {
    id: "requests",
    name: "Requests",
    title: "Requests",
    element,
    show: start,
    hide: () => following?.abort(),
    shortcut(key) {
      if (key !== "/") return false;
      filters.key.input.focus();
      return true;
    },
  };
}

/** One request: a row, and its way below it once it is opened. */
function line(row) {
  const button = h("button", { class: "quiet open", type: "button", "aria-expanded": "false", "aria-label": `Request of ${moment(row.at)}` }, moment(row.at));
  const cell = h("td", { class: "strip" });
  const good = row.status < 400 && row.end === "done";
  const tone = good ? "good" : row.status === 499 || row.end === "client_left" ? "warn" : "bad";
  // Every prompt has tokens: none are what nobody has counted.
  const tokens = [row.prompt_tokens, row.cached_tokens, row.completion_tokens].map((value) => (row.prompt_tokens ? value : null));
  const top = h(
    "tr",
    { onclick: toggle },
    h("td", null, button),
    text(row.key), text(row.model),
    h("td", null, h("span", { class: "cut" }, row.node ?? "–"), row.resumed ? h("span", { class: "tag" }, "moved") : null),
    h("td", null, h("span", { class: `pill ${tone}` }, String(row.status), good ? null : h("span", { class: "wide" }, row.end))),
    tokens.map((value) => h("td", { class: "number" }, count(value))),
    h("td", { class: "number" }, duration(row.time_to_first_token_seconds)),
    h("td", { class: "number" }, duration(row.duration_seconds)),
    cell,
  );
  const element = h("tbody", null, top);
  let below = null;
  let scaled = -1;

  function toggle() {
    below?.remove();
    below = below ? null : h("tr", { class: "opened" }, h("td", { colspan: 11 }, h("div", { class: "inside" }, waterfall(row), facts(row))));
    if (below) element.append(below);
    mark(button, "aria-expanded", String(below !== null));
    mark(top, "class", below ? "chosen" : null);
  }

  return {
    element,
    update() {},
    scale(longest) {
      if (longest === scaled) return;
      scaled = longest;
      fill(cell, strip(row, longest));
    },
  };
}

function text(value) {
  const cell = h("td");
  add(cell, h("span", { class: "cut", title: value }, value ?? "–"));
  return cell;
}

/** A line over the rows in sight. */
function sums(rows) {
  if (!rows.length) return "";
  const bad = rows.filter((row) => row.status >= 400 && row.status !== 499).length;
  const firsts = rows.map((row) => row.time_to_first_token_seconds).filter((value) => typeof value === "number").sort((a, b) => a - b);
  const parts = [`${count(rows.length)} shown`, `${count(bad)} failed`];
  if (firsts.length >= WORTH_A_MEAN) parts.push(`first token: median ${duration(firsts[Math.floor(firsts.length / 2)])}, 95th percentile ${duration(firsts[Math.floor(firsts.length * 0.95)])}`);
  return parts.join(" · ");
}
