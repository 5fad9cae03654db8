/**
 * Answers as models write them, in elements: paragraphs, headings, lists, tables, quotes, code, emphasis, links. A
 * small part of CommonMark, chosen so that half an answer looks like the beginning of the whole one. All text stays text;
 * links lead to http(s) only.
 */

import { h } from "./dom.js";

/** @param {string} text @returns {HTMLElement[]} */
export function markdown(text) {
  return blocks(text.split("\n"));
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8;

function blocks(lines, depth = 0) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end++;
      found.push(code(lines.slice(at + 1, end).join("\n"), fence[2]));
      at = end + 1;
    } else if (heading) {
      found.push(h(`h${Math.min(6, heading[1].length + 2)}`, null, inline(heading[2])));
      at++;
    } else if (RULE.test(line)) {
      found.push(h("hr"));
      at++;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const inner = [];
      while (at < lines.length && QUOTE.test(lines[at])) inner.push(QUOTE.exec(lines[at++])[1]);
      found.push(h("blockquote", null, blocks(inner, depth + 1)));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const end = listEnd(lines, at);
      found.push(list(lines.slice(at, end), depth));
      at = end;
    } else if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) end++;
      found.push(table(lines[at], lines.slice(at + 2, end)));
      at = end;
    } else {
      let end = at + 1;
      while (end < lines.length && !begins(lines[end])) end++;
      found.push(h("p", null, lines.slice(at, end).map((one, index) => [index ? h("br") : null, inline(one)])));
      at = end;
    }
  }
  return found;
}

/** Whether a line ends the paragraph before it. */
function begins(line) {
  return !line.trim() || [FENCE, HEADING, QUOTE, ITEM].some((kind) => kind.test(line));
}

function listEnd(lines, at) {
  const indent = ITEM.exec(lines[at])[1].length;
  let end = at + 1;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    const inside = item ? item[1].length >= indent : /^\s+\S/.test(lines[end]);
    const gap = !lines[end].trim() && (ITEM.test(lines[end + 1] ?? "") || /^\s+\S/.test(lines[end + 1] ?? ""));
    if (!inside && !gap) break;
    end++;
  }
  return end;
}

function list(lines, depth) {
  const [, indent, bullet] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(bullet);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items.at(-1)?.push(line.replace(new RegExp(`^\\s{0,${indent.length + (ordered ? 3 : 2)}}`), ""));
  }
  const start = ordered ? Number.parseInt(bullet, 10) : 1;
  return h(ordered ? "ol" : "ul", { start: start === 1 ? null : start }, items.map((item) => h("li", null, tight(blocks(item, depth + 1)))));
}

/** An item that is one paragraph needs no paragraph. */
function tight(parts) {
  return parts[0]?.tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts;
}

function table(head, rows) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  return h(
    "div",
    { class: "scroll" },
    h("table", null, h("thead", null, h("tr", null, cells(head).map((cell) => h("th", { scope: "col" }, cell)))), h("tbody", null, rows.map((row) => h("tr", null, cells(row).map((cell) => h("td", null, cell)))))),
  );
}

function code(text, language) {
  return h("pre", { tabindex: "0", "data-language": language || null }, h("code", null, text));
}

const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?\S?)\*\*|__(?=\S)(.+?\S?)__(?!\w)|(?<![\w*])\*(?=\S)([^*]+?)\*(?!\*)|(?<!\w)_(?=\S)([^_]+?)_(?!\w)|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>()"']+[^\s<>()"'.,;:!?])/;

/** @param {string} text @returns {(string | HTMLElement)[]} */
function inline(text) {
  const parts = [];
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    parts.push(rest.slice(0, found.index), element(found));
    rest = rest.slice(found.index + found[0].length);
  }
  return [...parts, rest];
}

function element(found) {
  const [, , span, strong, strongToo, soft, softToo, words, address, bare] = found;
  if (span) return h("code", null, span.trim() || span);
  if (strong || strongToo) return h("strong", null, inline(strong || strongToo));
  if (soft || softToo) return h("em", null, inline(soft || softToo));
  return h("a", { href: address || bare, target: "_blank", rel: "noopener noreferrer nofollow" }, words ? inline(words) : bare);
}
