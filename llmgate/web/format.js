/** Figures as people read them. All pure. */

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const clockTime = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dateTime = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
const dayName = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });

/** Missing values are dashes. */
export const NONE = "–";

/** A count in full. @param {number | null | undefined} value */
export function count(value) {
  return known(value) ? whole.format(value) : NONE;
}

/** A count in few characters: 1.2K, 3.4M. */
export function brief(value) {
  if (!known(value)) return NONE;
  return value < 10000 ? whole.format(value) : short.format(value);
}

/** A rate: one digit after the point below 100. */
export function rate(value) {
  if (!known(value)) return NONE;
  return value < 100 ? tenth.format(value) : whole.format(value);
}

/** 0.42 -> 42%. */
export function percent(value) {
  return known(value) ? `${Math.round(value * 100)}%` : NONE;
}

/** Seconds of work: 4 ms, 230 ms, 1.32 s, 12.4 s, 2 min 5 s. */
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  return span(seconds);
}

/** A longer time: 4:05 min as "4 min 5 s", then "2 h 10 min", then "3 d 4 h". */
export function span(seconds) {
  if (!known(seconds)) return NONE;
  const left = Math.max(0, Math.round(seconds));
  if (left < 60) return `${left} s`;
  if (left < 3600) return pair(left, 60, "min", "s");
  if (left < 86400) return pair(Math.round(left / 60), 60, "h", "min");
  return pair(Math.round(left / 3600), 24, "d", "h");
}

function pair(value, base, large, small) {
  const rest = value % base;
  return `${Math.floor(value / base)} ${large}${rest ? ` ${rest} ${small}` : ""}`;
}

/** The time of a moment today, the date of an earlier one. @param {number} at seconds since the epoch */
export function moment(at, now = Date.now() / 1000) {
  if (!known(at)) return NONE;
  const when = new Date(at * 1000);
  return now - at < 20 * 3600 ? clockTime.format(when) : dateTime.format(when);
}

/** A date and time in ISO 8601 as people write it. */
export function date(iso) {
  return iso ? dateTime.format(new Date(iso)) : NONE;
}

/** 2026-11-30 -> 30 Nov. */
export function day(iso) {
  return dayName.format(new Date(`${iso}T00:00:00Z`));
}

/** "1 node", "3 nodes". */
export function several(value, word) {
  return `${count(value)} ${word}${value === 1 ? "" : "s"}`;
}

function known(value) {
  return typeof value === "number" && Number.isFinite(value);
}
