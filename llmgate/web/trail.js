/** What the charts know of the last quarter of an hour: samples that the gate sent, the newest added as they come. */

const KEPT_S = 900;

/**
 * @typedef {{at: number[], running: (number | null)[], waiting: (number | null)[], kv_used: (number | null)[],
 *   tokens_per_second: (number | null)[]}} Samples
 */

const EMPTY = { at: [], running: [], waiting: [], kv_used: [], tokens_per_second: [] };

export class Trail {
  /** @type {Map<string, Samples>} */
  #nodes = new Map();

  /**
   * Add what is newer than what is known. After a new connection the gate sends all of it again, perhaps from another
   * worker, whose samples are of other moments.
   * @param {Record<string, Samples>} history by node @param {number} now
   */
  add(history, now) {
    for (const name of this.#nodes.keys()) if (!(name in history)) this.#nodes.delete(name);
    for (const [name, fresh] of Object.entries(history)) {
      const known = this.#nodes.get(name) ?? EMPTY;
      const last = known.at.at(-1) ?? 0;
      const from = fresh.at.findIndex((at) => at > last + 1);
      const begin = known.at.findIndex((at) => at > now - KEPT_S);
      const merged = {};
      for (const figure of Object.keys(EMPTY)) {
        merged[figure] = [...(begin < 0 ? [] : known[figure].slice(begin)), ...(from < 0 ? [] : fresh[figure].slice(from))];
      }
      this.#nodes.set(name, merged);
    }
  }

  /** @returns {Samples} */
  of(name) {
    return this.#nodes.get(name) ?? EMPTY;
  }

  all() {
    return [...this.#nodes.values()];
  }
}

/**
 * One figure of all nodes together, or the mean of those that have it. Nodes are sampled at the same moments.
 * @param {Samples[]} nodes @param {string} figure @param {{mean?: boolean}} [options]
 */
export function summed(nodes, figure, { mean = false } = {}) {
  const at = nodes.reduce((longest, node) => (node.at.length > longest.length ? node.at : longest), []);
  const values = at.map((_, index) => {
    const known = nodes.map((node) => node[figure][index - (at.length - node.at.length)]).filter((value) => typeof value === "number");
    const total = known.reduce((all, value) => all + value, 0);
    return known.length ? total / (mean ? known.length : 1) : null;
  });
  return { at, values };
}
