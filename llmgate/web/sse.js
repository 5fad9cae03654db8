/**
 * Server-sent events over fetch, since EventSource can show no key. Comments are handed on too: the gate says in them
 * at which node a stream goes on.
 */

/**
 * @typedef {{event: string, data: string} | {comment: string}} Message
 */

/**
 * The messages of a response, as they come. Ends with the stream; throws what reading it throws.
 * @param {Response} response
 * @returns {AsyncGenerator<Message>}
 */
export async function* messages(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new Parser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.feed(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Text to messages, however it was cut. Source of the rules: the HTML standard, 9.2.6. */
export class Parser {
  #rest = "";
  #event = "";
  /** @type {string[]} */
  #data = [];

  /** @param {string} text @returns {Generator<Message>} */
  *feed(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "") {
        if (this.#data.length) yield { event: this.#event || "message", data: this.#data.join("\n") };
        this.#event = "";
        this.#data = [];
      } else if (line.startsWith(":")) {
        yield { comment: line.slice(1).trim() };
      } else {
        const at = line.indexOf(":");
        const name = at < 0 ? line : line.slice(0, at);
        const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
        if (name === "data") this.#data.push(value);
        else if (name === "event") this.#event = value;
      }
    }
  }
}
