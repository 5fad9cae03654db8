/** What was used, by whom and of what, over days; and the keys with which it was. */

import { SHADES, legend, stacked } from "./charts.js";
import { fill, h, mark } from "./dom.js";
import { brief, count, day, duration, percent } from "./format.js";
import { keysPanel } from "./keys.js";
import { failed, loading, state } from "./states.js";

const DAY_MS = 86400e3;
const OTHERS = "others";
const FIGURES = {
  tokens: { name: "Tokens", of: (row) => row.prompt_tokens + row.completion_tokens },
  requests: { name: "Requests", of: (row) => row.requests },
  computed: { name: "Computed", of: (row) => row.prompt_tokens - row.cached_tokens + row.completion_tokens },
};

/** @param {import("./api.js").Gate} gate @returns {import("./main.js").Page} */
export function usagePage(gate) {
  const keys = keysPanel(gate);
  const chosen = { days: 7, by: "key", figure: "tokens" };
  const content = h("div", { class: "inside" }, loading(1));
  const switches = [
    segments("By", { key: "By key", model: "By model" }, "by"),
    segments("Figure", Object.fromEntries(Object.entries(FIGURES).map(([id, { name }]) => [id, name])), "figure"),
    segments("Time", { 7: "7 days", 30: "30 days", 90: "90 days" }, "days"),
  ];
  const element = h(
    "section",
    { "aria-labelledby": "usage-title" },
    h("div", { class: "head" }, h("h1", { id: "usage-title" }, "Usage and keys")),
    h("div", { class: "stack" },
      h("section", { class: "panel", "aria-label": "Usage" }, h("div", { class: "title" }, h("h2", null, "Usage"), h("span", { class: "grow" }), switches), content),
      keys.element),
  );
  /** @type {any} */
  let usage = null;

  function segments(label, names, what) {
    const buttons = Object.entries(names).map(([value, name]) =>
      h("button", { type: "button", "aria-pressed": String(String(chosen[what]) === value), onclick: () => choose(value) }, name));
    function choose(value) {
      chosen[what] = what === "days" ? Number(value) : value;
      buttons.forEach((button, at) => mark(button, "aria-pressed", String(Object.keys(names)[at] === value)));
      if (what === "figure") draw();
      else load();
    }
    return h("div", { class: "segments", role: "group", "aria-label": label }, buttons);
  }

  async function load() {
    const days = lastDays(chosen.days);
    const query = `since=${days[0]}`;
    try {
      const [daily, whole] = await Promise.all([
        gate.ask(`admin/usage?by=${chosen.by},day&${query}`),
        gate.ask(`admin/usage?by=${chosen.by}&${query}`),
      ]);
      usage = { daily: daily.rows, rows: whole.rows, total: whole.total, days, by: chosen.by };
      draw();
    } catch (error) {
      usage = null;
      if (error.status === 404) fill(content, state("This gate keeps no usage", "The setting usage is off."));
      else fill(content, failed(error, load));
    }
  }

  let redrawing = 0;
  function redraw() {
    redrawing ||= requestAnimationFrame(() => {
      redrawing = 0;
      draw();
    });
  }

  function draw() {
    if (!usage) return;
    if (!usage.rows.length) return fill(content, state("Nothing was used yet", `No request has ended in the last ${chosen.days} days.`));
    const { of, name } = FIGURES[chosen.figure];
    const order = [...usage.rows].sort((a, b) => of(b) - of(a));
    const shown = order.slice(0, order.length > SHADES ? SHADES - 1 : SHADES).map((row) => row[usage.by] ?? "");
    const shade = (who) => (shown.includes(who) ? shown.indexOf(who) : SHADES - 1);
    const days = usage.days.map((date) => ({
      name: day(date),
      parts: [...shown, ...(order.length > shown.length ? [OTHERS] : [])].map((who) => ({
        name: who,
        shade: shade(who),
        value: usage.daily.filter((row) => row.day === date && (who === OTHERS ? !shown.includes(row[usage.by]) : row[usage.by] === who)).reduce((sum, row) => sum + of(row), 0),
      })),
    }));
    const series = shown.map((who) => ({ name: who, shade: shade(who) }));
    if (order.length > shown.length) series.push({ name: OTHERS, shade: SHADES - 1 });
    fill(
      content,
      h("div", { class: "stack" },
        h("div", { class: "usage" },
          h("figure", null, stacked(`${name} a day, by ${usage.by}`, days, brief, Math.min(760, innerWidth - 56)), h("figcaption", null, legend(series))),
          totals(usage.total)),
        byWho(order, usage.by)),
    );
  }

  return {
    id: "usage",
    name: "Usage",
    title: "Usage and keys",
    element,
    show() {
      addEventListener("resize", redraw);
      load();
      keys.load();
    },
    hide: () => removeEventListener("resize", redraw),
    shortcut(key) {
      if (key !== "n") return false;
      keys.create();
      return true;
    },
  };
}

/** The sums, as figures beside the chart. */
function totals(total) {
  const prompt = total.prompt_tokens || 0;
  const pairs = [
    ["Requests", count(total.requests)],
    ["of them failed", count(total.failed)],
    ["Prompt tokens", brief(prompt)],
    ["of them cached", percent(prompt ? total.cached_tokens / prompt : 0)],
    ["Answer tokens", brief(total.completion_tokens)],
    ["Moved to another node", count(total.resumed)],
  ];
  return h("dl", { class: "totals" }, pairs.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
}

function byWho(rows, by) {
  const heads = [[by === "key" ? "Key" : "Model", ""], ["Requests", "number"], ["Failed", "number"], ["Prompt", "number"], ["Cached", "number"], ["Answer", "number"], ["First token (mean)", "number"]];
  return h(
    "div",
    { class: "scroll edge" },
    h("table", null,
      h("thead", null, h("tr", null, heads.map(([name, kind]) => h("th", { scope: "col", class: kind }, name)))),
      h("tbody", null, rows.map((row) => h("tr", null,
        h("th", { scope: "row" }, row[by] || "–"),
        [row.requests, row.failed, row.prompt_tokens].map((value) => h("td", { class: "number" }, count(value))),
        h("td", { class: "number" }, row.prompt_tokens ? percent(row.cached_tokens / row.prompt_tokens) : "–"),
        h("td", { class: "number" }, count(row.completion_tokens)),
        h("td", { class: "number" }, duration(row.time_to_first_token_seconds)))))),
  );
}

/** The last days in UTC, the way the ledger counts them, today included. @returns {string[]} */
function lastDays(number) {
  const today = Date.now();
  return Array.from({ length: number }, (_, at) => new Date(today - (number - 1 - at) * DAY_MS).toISOString().slice(0, 10));
}
