// The allocation, in plain JavaScript: the same steps, in the same order, as headkv.scorers (pooling)
// and headkv.allocators (uniform, Ada-KV), so that a page without a kernel shows what the package keeps.

/**
 * @typedef {{ best: Uint32Array, mass: Float64Array, filled: number }} RankedHead positions best first, raw mass so far
 * @typedef {{ m: number, pooled: Float32Array, order: Uint32Array, heads: RankedHead[] }} RankedLayer all entries of a
 *   layer, best first: pooled [H * m], order [H * m]
 * @typedef {{ budget: number, safeguard: number, pooling: "max" | "avg" | "none", kernel: number,
 *   allocator: "uniform" | "adaptive", window: number }} Setting
 */

/**
 * Decode little-endian IEEE half floats; exact, as every half is a float32.
 * @param {DataView} view
 * @param {number} count
 */
function decodeHalf(view, count) {
  const bits = new Uint16Array(view.buffer.slice(view.byteOffset, view.byteOffset + 2 * count));
  const out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const exponent = (bits[i] >> 10) & 31;
    const fraction = bits[i] & 1023;
    const size = exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction;
    out[i] = bits[i] >> 15 ? -size : size;
  }
  return out;
}

/**
 * Pool one row of scores: stride 1, k // 2 padding; the average counts the padding, as torch's does.
 * @param {Float32Array} row
 * @param {Setting["pooling"]} kind
 * @param {number} kernel
 */
function poolScores(row, kind, kernel) {
  if (kind === "none" || kernel === 1) return row;
  const half = kernel >> 1;
  const out = new Float32Array(row.length);
  let top = -1; // where the greatest of the window stands: looked for anew only once it has left
  for (let i = 0; i < row.length; i++) {
    const from = Math.max(0, i - half);
    const to = Math.min(row.length, i + half + 1);
    if (kind === "avg") {
      let sum = 0;
      for (let j = from; j < to; j++) sum = Math.fround(sum + row[j]);
      out[i] = sum / kernel;
    } else {
      const old = top < from;
      if (old) top = from;
      for (let j = old ? from : to - 1; j < to; j++) if (row[j] > row[top]) top = j;
      out[i] = row[top];
    }
  }
  return out;
}

const [DIGITS, RADIX] = [3, 2048]; // 33 bits

/**
 * Indices of non-negative float32 values, highest first, ties by index: their bits rise with them, and are sorted digit by
 * digit from the lowest, each time without changing the order of equal ones.
 * @param {Float32Array} values
 */
function rankDescending(values) {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  let order = new Uint32Array(bits.length);
  for (let i = 0; i < order.length; i++) order[i] = i;
  let next = new Uint32Array(bits.length);
  for (let digit = 0; digit < DIGITS; digit++) {
    const shift = 11 * digit;
    const ends = new Uint32Array(RADIX + 1);
    for (let i = 0; i < bits.length; i++) ends[RADIX - ((bits[i] >>> shift) & (RADIX - 1))]++;
    for (let i = 1; i <= RADIX; i++) ends[i] += ends[i - 1];
    for (let k = 0; k < order.length; k++) {
      const i = order[k];
      next[ends[RADIX - 1 - ((bits[i] >>> shift) & (RADIX - 1))]++] = i;
    }
    [order, next] = [next, order];
  }
  return order;
}

/** Python's round: halves go to the even neighbour. @param {number} x */
function roundHalfEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

/**
 * Entries a head keeps on average, window included, for a share of n; at least 1.
 * @param {number} share
 * @param {number} n
 */
export function entriesOf(share, n) {
  return Math.min(n, Math.max(1, roundHalfEven(share * n)));
}

const PARTS = 1e9; // of a slot; targets are read to a billionth, so that equal ones stay equal

/**
 * Whole numbers that sum to `total`, none above its cap: whole parts, then one each by largest fraction (ties: first).
 * @param {number[]} targets
 * @param {number} total
 * @param {number} cap
 */
function largestRemainder(targets, total, cap) {
  const parts = targets.map((x) => Math.floor(x * PARTS + 0.5));
  const whole = parts.map((x) => Math.min(Math.floor(x / PARTS), cap));
  const fraction = parts.map((x, i) => x - whole[i] * PARTS);
  for (;;) {
    const left = total - whole.reduce((sum, x) => sum + x, 0);
    if (left === 0) return whole;
    const step = Math.sign(left);
    targets.map((_, i) => i)
      .sort((i, j) => step * (fraction[j] - fraction[i]) || i - j)
      .filter((i) => (step > 0 ? whole[i] < cap : whole[i] > 0))
      .slice(0, Math.abs(left))
      .forEach((i) => (whole[i] += step));
  }
}

/**
 * How many of the best `k` entries of a layer fall in each head; scores equal to the k-th share in proportion.
 * @param {RankedLayer} ranked
 * @param {number} k
 */
function countWinners({ order, pooled, heads, m }, k) {
  if (k === 0) return heads.map(() => 0);
  const threshold = pooled[order[k - 1]];
  const above = heads.map(() => 0);
  const level = heads.map(() => 0);
  for (let rank = 0; rank < order.length && pooled[order[rank]] >= threshold; rank++) {
    (pooled[order[rank]] > threshold ? above : level)[Math.floor(order[rank] / m)]++;
  }
  const sum = (counts) => counts.reduce((x, y) => x + y, 0);
  const rest = k - sum(above);
  return above.map((count, i) => count + (rest * level[i]) / sum(level));
}

/**
 * Budgets [H], window excluded: sum exactly H * slots.
 * @param {RankedLayer} ranked
 * @param {number} slots
 * @param {Setting["allocator"]} allocator
 * @param {number} safeguard
 * @returns {number[]}
 */
function allocate(ranked, slots, allocator, safeguard) {
  const heads = ranked.heads.length;
  if (allocator === "uniform") return new Array(heads).fill(slots);
  const winners = countWinners(ranked, heads * slots);
  const targets = winners.map((count) => (1 - safeguard) * count + safeguard * slots);
  return largestRemainder(targets, heads * slots, ranked.m);
}

/**
 * No head may end with nothing: larger ones give.
 * @param {number[]} budgets
 * @param {number} m
 */
function atLeastOne(budgets, m) {
  if (!budgets.includes(0)) return budgets;
  const sum = (list) => list.reduce((x, y) => x + y, 0);
  const total = Math.max(sum(budgets), budgets.length) - budgets.length;
  const spare = budgets.map((b) => Math.max(b, 1) - 1);
  const targets = spare.map((x) => (total ? (x * total) / sum(spare) : 0));
  return largestRemainder(targets, total, m - 1).map((x) => x + 1);
}

/** Raw scores [layers, heads, m] with pooled and ranked views of each layer, remembered per setting. */
export class Scores {
  /**
   * @param {DataView} view
   * @param {[number, number, number]} shape
   * @param {number} exponent
   */
  constructor(view, [layers, heads, m], exponent) {
    this.layers = layers;
    this.heads = heads;
    this.m = m;
    this.unit = 2 ** -exponent;
    this.raw = decodeHalf(view, layers * heads * m);
    this.setting = "";
    /** @type {RankedLayer[]} */
    this.cache = [];
  }

  /**
   * Raw scores of one head [m]; multiply by `unit` to get attention back.
   * @param {number} layer
   * @param {number} head
   */
  row(layer, head) {
    const from = (layer * this.heads + head) * this.m;
    return this.raw.subarray(from, from + this.m);
  }

  /**
   * One layer, pooled and ranked.
   * @param {number} layer
   * @param {Setting["pooling"]} pooling
   * @param {number} kernel
   */
  ranked(layer, pooling, kernel) {
    const setting = `${pooling} ${kernel}`;
    if (setting !== this.setting) {
      this.setting = setting;
      this.cache = [];
    }
    return (this.cache[layer] ??= this.rank(layer, pooling, kernel));
  }

  /**
   * @param {number} layer
   * @param {Setting["pooling"]} pooling
   * @param {number} kernel
   * @returns {RankedLayer}
   */
  rank(layer, pooling, kernel) {
    const { heads: count, m } = this;
    const pooled = new Float32Array(count * m);
    for (let h = 0; h < count; h++) pooled.set(poolScores(this.row(layer, h), pooling, kernel), h * m);
    const order = rankDescending(pooled);
    const heads = Array.from({ length: count }, () => ({
      best: new Uint32Array(m),
      mass: new Float64Array(m + 1),
      filled: 0,
    }));
    const from = layer * count * m;
    for (let rank = 0; rank < order.length; rank++) {
      const index = order[rank];
      const h = (index / m) | 0;
      const head = heads[h];
      const at = head.filled++;
      head.best[at] = index - h * m;
      head.mass[at + 1] = head.mass[at] + this.raw[from + index];
    }
    return { m, pooled, order, heads };
  }
}

/**
 * The whole plan for one setting: budgets, lengths and attention held [layers][heads], and the shares they come to.
 * @typedef {ReturnType<typeof makePlan>} Plan
 * @param {Scores} scores
 * @param {Setting} setting
 */
export function makePlan(scores, { budget, safeguard, pooling, kernel, allocator, window }) {
  const { layers, heads, m } = scores;
  const n = m + window;
  const entries = entriesOf(budget, n);
  const recent = Math.min(window, entries);
  const slots = entries - recent;
  const [budgetsOf, lengths, held] = /** @type {number[][][]} */ ([[], [], []]);
  const plan = {
    n,
    entries,
    recent,
    slots,
    budgets: budgetsOf,
    lengths,
    held,
    kept: 0,
    mass: 0,
    evenMass: 0,
    total: 0,
  };
  let total = 0;
  for (let layer = 0; layer < layers; layer++) {
    const ranked = scores.ranked(layer, pooling, kernel);
    const shares = allocate(ranked, slots, allocator, safeguard);
    const budgets = recent ? shares : atLeastOne(shares, m);
    plan.budgets.push(budgets);
    plan.lengths.push(budgets.map((b) => b + recent));
    plan.held.push(budgets.map((b, h) => ranked.heads[h].mass[b] / (ranked.heads[h].mass[m] || 1)));
    budgets.forEach((b, h) => {
      plan.kept += b + recent;
      plan.mass += ranked.heads[h].mass[b];
      plan.evenMass += ranked.heads[h].mass[slots];
      total += ranked.heads[h].mass[m];
    });
  }
  plan.total = layers * heads * n;
  plan.mass /= total || 1;
  plan.evenMass /= total || 1;
  return plan;
}

/**
 * Which of the n entries head (layer, head) keeps: [n] of 0 and 1.
 * @param {Scores} scores
 * @param {Plan} plan
 * @param {Setting} setting
 * @param {number} layer
 * @param {number} head
 */
export function keptMask(scores, plan, setting, layer, head) {
  const mask = new Uint8Array(plan.n);
  const { best } = scores.ranked(layer, setting.pooling, setting.kernel).heads[head];
  for (let i = 0; i < plan.budgets[layer][head]; i++) mask[best[i]] = 1;
  mask.fill(1, plan.n - plan.recent);
  return mask;
}

/**
 * All masks, packed 8 entries a byte, first entry in the highest bit (numpy's packbits): [layers * heads * ceil(n / 8)].
 * @param {Scores} scores
 * @param {Plan} plan
 * @param {Setting} setting
 */
export function packKept(scores, plan, setting) {
  const stride = Math.ceil(plan.n / 8);
  const bytes = new Uint8Array(scores.layers * scores.heads * stride);
  for (let layer = 0; layer < scores.layers; layer++) {
    for (let head = 0; head < scores.heads; head++) {
      const from = (layer * scores.heads + head) * stride;
      keptMask(scores, plan, setting, layer, head).forEach((bit, i) => {
        if (bit) bytes[from + (i >> 3)] |= 128 >> (i & 7);
      });
    }
  }
  return new DataView(bytes.buffer);
}
