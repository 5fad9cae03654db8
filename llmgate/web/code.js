/** A request as a program would make it. The key is not in it: programs read theirs from the environment. */

/** @param {string} address of the gate, without a slash at the end @param {Record<string, unknown>} body */
export function curl(address, body) {
  const text = JSON.stringify({ ...body, stream: true }, null, 2).replaceAll("'", "'\\''");
  return [
    `curl -N ${address}/v1/chat/completions \\`,
    `  -H "Authorization: Bearer $LLMRACK_KEY" \\`,
    `  -H 'Content-Type: application/json' \\`,
    `  -d '${text}'`,
  ].join("\n");
}

/** Fields that OpenAI's client has no argument for, and takes in `extra_body`. */
const EXTRA = new Set([
  "top_k", "min_p", "typical_p", "top_n_sigma", "repeat_penalty", "repeat_last_n", "dry_multiplier", "xtc_probability",
  "enable_thinking", "thinking_budget_tokens", "mirostat", "ignore_eos",
]);

/** @param {string} address @param {Record<string, unknown>} body */
export function python(address, body) {
  const named = Object.entries(body).filter(([name]) => !EXTRA.has(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => EXTRA.has(name)));
  const given = named.map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  if (Object.keys(extra).length) given.push(`    extra_body=${literal(extra, 1)},`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${address}/v1`)}, api_key=os.environ["LLMRACK_KEY"])`,
    "stream = client.chat.completions.create(",
    ...given,
    "    stream=True,",
    ")",
    "for chunk in stream:",
    "    if chunk.choices and chunk.choices[0].delta.content:",
    '        print(chunk.choices[0].delta.content, end="", flush=True)',
  ].join("\n");
}

/** A JSON value in Python. */
function literal(value, depth = 0) {
  const inner = "    ".repeat(depth + 1);
  const outer = "    ".repeat(depth);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) {
    if (!value.length) return "[]";
    return `[\n${value.map((one) => `${inner}${literal(one, depth + 1)},`).join("\n")}\n${outer}]`;
  }
  if (typeof value === "object") {
    const parts = Object.entries(value).map(([name, one]) => `${inner}${JSON.stringify(name)}: ${literal(one, depth + 1)},`);
    return parts.length ? `{\n${parts.join("\n")}\n${outer}}` : "{}";
  }
  // JSON's escapes of text and its numbers are Python's too.
  return JSON.stringify(value);
}
