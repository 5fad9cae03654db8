/** One request's way: the wait for a node, its attempts, the first token, the end; as bars over one stretch of time. */

import { h, s } from "./dom.js";
import { NONE, count, duration } from "./format.js";

const WIDTH = 1000;

/**
 * @param {any} row of /admin/requests
 * @returns {HTMLElement}
 */
export function waterfall(row) {
  const total = Math.max(row.duration_seconds || 0, 1e-4);
  const attempts = row.attempts ?? [];
  const steps = [];
  if (row.queued_seconds !== null && row.queued_seconds !== undefined) {
    steps.push(["Wait for a node", "", 0, row.queued_seconds, "wait"]);
  }
  attempts.forEach((attempt, at) => {
    const from = attempt.at ?? row.queued_seconds ?? 0;
    const seconds = attempt.seconds ?? total - from;
    const good = attempt.outcome.startsWith("answered");
    steps.push([`${attempt.resume ? "Goes on at" : at ? "Again at" : "Asks"} ${attempt.node}`, good ? "" : attempt.why || attempt.outcome, from, seconds, good ? "good" : "bad"]);
  });
  const first = row.time_to_first_token_seconds;
  const grid = h("div", { class: "waterfall", role: "table", "aria-label": "Where the time went" });
  for (const [name, note, from, seconds, tone] of steps) {
    grid.append(step(name, note, duration(seconds), bar(from, seconds, total, tone, first)));
  }
  if (first !== null && first !== undefined) grid.append(step("First token", "", duration(first), point(first, total)));
  grid.append(step("End", row.end === "done" ? "" : row.end, duration(row.duration_seconds), point(total, total)));
  return grid;
}

function step(name, note, time, picture) {
  return h(
    "div",
    { class: "step", role: "row" },
    h("div", { role: "rowheader" }, h("span", null, name), note ? h("span", { class: "soft small note" }, note) : null),
    h("div", { role: "cell" }, picture),
    h("div", { role: "cell", class: "number" }, time),
  );
}

function bar(from, seconds, total, tone, first) {
  const x = (from / total) * WIDTH;
  const width = Math.max(3, (seconds / total) * WIDTH);
  const said = [s("rect", { class: "ground", width: WIDTH, height: 10 }), s("rect", { class: tone, x, width: Math.min(width, WIDTH - x), height: 10, rx: 2 })];
  // Up to its first token the node computed the prompt.
  const until = first === null || first === undefined ? 0 : (first / total) * WIDTH;
  if (tone !== "wait" && until > x && until < x + width) said.push(s("rect", { class: "prompt", x, width: until - x, height: 10 }));
  return picture(said);
}

function point(at, total) {
  const x = Math.min(WIDTH - 3, (at / total) * WIDTH);
  return picture([s("rect", { class: "ground", width: WIDTH, height: 10 }), s("rect", { class: "point", x, width: 3, height: 10 })]);
}

function picture(parts) {
  return s("svg", { class: "span", viewBox: `0 0 ${WIDTH} 10`, preserveAspectRatio: "none", "aria-hidden": "true" }, parts);
}

/** The same in the width of a cell: waiting, up to the first token, and the rest, beside what is long in the list. */
export function strip(row, longest) {
  const scale = WIDTH / Math.max(longest, 1e-4);
  const at = (seconds) => Math.min(WIDTH, (seconds ?? 0) * scale);
  const queued = at(row.queued_seconds);
  const first = Math.max(queued, at(row.time_to_first_token_seconds ?? row.duration_seconds));
  const end = Math.max(first, at(row.duration_seconds), 4);
  return picture([
    s("rect", { class: "wait", width: queued, height: 10 }),
    s("rect", { class: "prompt", x: queued, width: first - queued, height: 10 }),
    s("rect", { class: row.status < 400 && row.end === "done" ? "good" : "bad", x: first, width: Math.max(4, end - first), height: 10 }),
  ]);
}

/** What else is known of a request. */
export function facts(row) {
  const pairs = [
    ["Request", h("span", { class: "mono" }, row.request_id)],
    ["Key", row.key ?? NONE],
    ["Path", h("span", { class: "mono" }, row.path)],
    ["Model", row.model ?? NONE],
    ["Status", `${row.status} (${row.end})`],
    ["Streamed", row.stream ? "yes" : "no"],
    ["Prompt", !row.prompt_tokens ? NONE : `${count(row.prompt_tokens)} tokens, ${count(row.cached_tokens)} cached`],
    ["Answer", !row.prompt_tokens ? NONE : `${count(row.completion_tokens)} tokens`],
    ["Moved", row.resumed ? `${count(row.resumed)} time${row.resumed === 1 ? "" : "s"} to another node` : "no"],
    ["Gate", row.gate ?? NONE],
  ];
  return h("dl", { class: "pairs" }, pairs.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
}
