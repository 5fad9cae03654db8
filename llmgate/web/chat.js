/**
 * One answer of a chat, from the request to its end. Knows the wire and no page: what comes is written into a turn, and
 * whoever asked is told that it has changed.
 *
 * @typedef {{id: string, name: string, arguments: string}} Call
 * @typedef {{
 *   role: "user" | "assistant" | "tool",
 *   content: string,
 *   reasoning?: string,
 *   calls?: Call[],
 *   call?: Call,
 *   model?: string,
 *   facts?: Facts,
 * }} Turn  `call`: which call a tool's turn answers.
 * @typedef {{
 *   state: "asked" | "answering" | "done" | "stopped" | "failed",
 *   began: number, first?: number, last?: number, ended?: number, pieces: number,
 *   nodes: string[], request?: string, finish?: string, error?: string, usage?: any, ignored?: string,
 * }} Facts  Times in milliseconds. `nodes`: who answered, one after the other.
 */

import { Failure } from "./api.js";
import { messages } from "./sse.js";

const PATH = "v1/chat/completions";
const SPEED_FROM_S = 0.2;

/** The request for an answer to these turns. @param {Turn[]} turns @param {Record<string, unknown>} options */
export function request(turns, options) {
  const { system, ...fields } = options;
  const head = system ? [{ role: "system", content: system }] : [];
  return { ...fields, messages: [...head, ...turns.map(message)] };
}

/** @param {Turn} turn */
function message(turn) {
  if (turn.role === "tool") return { role: "tool", tool_call_id: turn.call.id, content: turn.content };
  if (turn.role === "user") return { role: "user", content: turn.content };
  const calls = (turn.calls ?? []).map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  return {
    role: "assistant",
    content: turn.content || (calls.length ? null : ""),
    ...(turn.reasoning ? { reasoning_content: turn.reasoning } : {}),
    ...(calls.length ? { tool_calls: calls } : {}),
  };
}

/**
 * Ask, and write the answer into `turn` as it comes. Never throws: how it ended is in `turn.facts`.
 * @param {import("./api.js").Gate} gate
 * @param {Record<string, unknown>} body as `request` makes it
 * @param {Turn} turn of the assistant, empty
 * @param {AbortSignal} signal
 * @param {() => void} changed
 */
export async function answer(gate, body, turn, signal, changed) {
  const facts = (turn.facts = { state: "asked", began: performance.now(), pieces: 0, nodes: [] });
  changed();
  try {
    const response = await gate.open(PATH, {
      body: { ...body, stream: true, stream_options: { include_usage: true } },
      headers: { "x-llmrack-tell": "node" },
      signal,
    });
    facts.request = response.headers.get("x-request-id") ?? undefined;
    facts.ignored = response.headers.get("x-llmrack-ignored") ?? undefined;
    at(facts, response.headers.get("x-llmrack-node"));
    let whole = false;
    for await (const message of messages(response)) {
      if ("comment" in message) at(facts, /^node (.+)$/.exec(message.comment)?.[1]);
      else if (message.data === "[DONE]") whole = true;
      else take(turn, JSON.parse(message.data));
      changed();
    }
    facts.state = whole ? "done" : "failed";
    if (!whole) facts.error = "The answer broke off.";
  } catch (error) {
    facts.state = error.name === "AbortError" ? "stopped" : "failed";
    if (facts.state === "failed") facts.error = error instanceof Failure ? error.message : "The connection broke in the middle of the answer.";
  }
  facts.ended = performance.now();
  changed();
}

function at(facts, node) {
  if (node && facts.nodes.at(-1) !== node) facts.nodes.push(node);
}

/** One chunk. @param {Turn} turn */
function take(turn, chunk) {
  const { facts } = turn;
  if (chunk.error) throw new Failure(200, chunk.error.message, chunk.error.code);
  if (chunk.usage) facts.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { delta = {}, finish_reason: finish } = choice;
  if (finish) facts.finish = finish;
  if (delta.content) turn.content += delta.content;
  if (delta.reasoning_content) turn.reasoning = (turn.reasoning ?? "") + delta.reasoning_content;
  for (const part of delta.tool_calls ?? []) {
    const calls = (turn.calls ??= []);
    const call = (calls[part.index] ??= { id: "", name: "", arguments: "" });
    if (part.id) call.id = part.id;
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (delta.content || delta.reasoning_content || delta.tool_calls) {
    facts.state = "answering";
    facts.first ??= performance.now();
    facts.last = performance.now();
    facts.pieces++;
  }
}

/**
 * The figures of an answer, in seconds and tokens. Speed counts from the first token on; while it comes, by pieces, which
 * are mostly tokens. Of an answer that is over in a moment it would be that of the network.
 * @param {Facts} facts
 */
export function figures(facts) {
  const { began, first, last, usage, pieces } = facts;
  const tokens = usage?.completion_tokens ?? pieces;
  const seconds = first !== undefined && last > first ? (last - first) / 1000 : 0;
  return {
    firstToken: first === undefined ? null : (first - began) / 1000,
    speed: seconds >= SPEED_FROM_S && tokens > 1 ? (tokens - 1) / seconds : null,
    prompt: usage?.prompt_tokens ?? null,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
    completion: usage?.completion_tokens ?? null,
  };
}
