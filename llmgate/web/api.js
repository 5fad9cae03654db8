/**
 * The gate, as the console asks it. Owns the key, which is kept for this tab alone (sessionStorage), and whether the
 * gate can be reached at all: while it cannot, it is asked until it answers, and whoever listens hears of both.
 */

import { messages } from "./sse.js";

const KEPT = "llmrack.key";
const AGAIN_MS = [500, 1000, 2000, 4000, 8000];

/** An answer that is an error, or none at all (status 0). */
export class Failure extends Error {
  /** @param {number} status @param {string} message @param {string | null} [code] */
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }

  get offline() {
    return this.status === 0;
  }
}

/**
 * Fires `offline`, `online` (the gate answers again) and `refused` (it no longer knows the key).
 */
export class Gate extends EventTarget {
  #key = sessionStorage.getItem(KEPT) ?? "";
  #offlineSince = 0;

  /** The key in use, "" for none. */
  get key() {
    return this.#key;
  }

  /** @param {string} key kept until the tab is closed, or `forget` is called */
  remember(key) {
    this.#key = key;
    if (key) sessionStorage.setItem(KEPT, key);
    else sessionStorage.removeItem(KEPT);
  }

  forget() {
    this.remember("");
  }

  /** Milliseconds since the epoch; 0 while the gate can be reached. */
  get offlineSince() {
    return this.#offlineSince;
  }

  /**
   * Ask for JSON. Throws Failure; an AbortError goes through.
   * @param {string} path without a slash in front, so that it works below any address
   * @param {{method?: string, body?: unknown, signal?: AbortSignal, key?: string}} [options]
   * @returns {Promise<any>}
   */
  async ask(path, options = {}) {
    const response = await this.open(path, options);
    return response.status === 204 ? null : response.json();
  }

  /** The same, for an answer that is read by the caller. @returns {Promise<Response>} */
  async open(path, { method, body, signal, key = this.#key, headers = {} } = {}) {
    let response;
    try {
      response = await fetch(path, {
        method: method ?? (body === undefined ? "GET" : "POST"),
        headers: {
          ...(key ? { authorization: `Bearer ${key}` } : {}),
          ...(body === undefined ? {} : { "content-type": "application/json" }),
          ...headers,
        },
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      this.#lost();
      throw new Failure(0, "The gate cannot be reached.");
    }
    this.#found();
    if (response.ok) return response;
    const failure = await failed(response);
    if (failure.status === 401 && key === this.#key) this.dispatchEvent(new Event("refused"));
    throw failure;
  }

  /**
   * Follow a stream of events until `signal` aborts; connect again when it ends. `said` gets each event's data,
   * decoded; `state` is called with "live", and with "waiting" and a Failure.
   * @param {string} path
   * @param {AbortSignal} signal
   * @param {{said: (data: any, event: string) => void, state?: (state: "live" | "waiting", failure?: Failure) => void}} to
   */
  async follow(path, signal, { said, state = () => {} }) {
    let misses = 0;
    while (!signal.aborted) {
      try {
        const response = await this.open(path, { signal });
        for await (const message of messages(response)) {
          if (signal.aborted) return;
          if (!("data" in message)) continue;
          misses = 0;
          state("live");
          said(JSON.parse(message.data), message.event);
        }
        state("waiting", new Failure(0, "The gate has ended the stream."));
      } catch (error) {
        if (signal.aborted) return;
        const failure = error instanceof Failure ? error : new Failure(0, "The stream broke off.");
        if (failure.offline) this.#lost();
        state("waiting", failure);
        if (failure.status === 401 || failure.status === 403 || failure.status === 404) return;
      }
      await pause(AGAIN_MS[Math.min(misses++, AGAIN_MS.length - 1)], signal);
    }
  }

  #lost() {
    if (this.#offlineSince) return;
    this.#offlineSince = Date.now();
    this.dispatchEvent(new Event("offline"));
    this.#lookOut();
  }

  #found() {
    if (!this.#offlineSince) return;
    this.#offlineSince = 0;
    this.dispatchEvent(new Event("online"));
  }

  async #lookOut() {
    for (let misses = 0; this.#offlineSince; misses++) {
      await pause(AGAIN_MS[Math.min(misses, 3)]);
      try {
        await fetch("health", { cache: "no-store" });
        this.#found();
      } catch {
        // Still away.
      }
    }
  }
}

/** What an error says, in the shapes of OpenAI's and of proxies in front of the gate. */
async function failed(response) {
  const text = await response.text().catch(() => "");
  try {
    const { error } = JSON.parse(text);
    return new Failure(response.status, error.message, error.code ?? null);
  } catch {
    return new Failure(response.status, `The answer was ${response.status} ${response.statusText}.`);
  }
}

/** @param {number} ms @param {AbortSignal} [signal] ends it early */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve(undefined);
    });
  });
}
