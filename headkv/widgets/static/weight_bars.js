// A case by hand: the weight of every entry of every head as a bar, kept ones solid, evicted ones an outline.

import { h } from "./toolkit.js";

/** Heads below each other; `update(masks, chosen)` says which entries are kept and which head is looked at. */
export function weightBars({ scores, heads, nameOf, n, m, tokens }) {
  const all = Array.from({ length: heads }, (_, head) => Array.from(scores.row(0, head), (x) => x * scores.unit));
  const top = Math.max(...all.flat()) || 1;
  const figure = (x) => (x >= 1 ? x.toPrecision(2) : x.toFixed(2).replace(/^0/, ""));
  const named = (i) => (tokens ? ` “${tokens[i].trim()}”` : "");
  const rows = all.map((weights, head) => {
    const bars = Array.from({ length: n }, (_, i) => {
      const fill = h("i");
      fill.style.height = `${i < m ? (100 * weights[i]) / top : 100}%`;
      const text = i < m ? figure(weights[i]) : "window";
      const under = [h("small", {}, text), ...(tokens ? [h("small.weight-word", {}, tokens[i].trim() || "·")] : [])];
      return h("span.weight", { role: "img" }, h("span.weight-bar-frame", {}, fill), ...under);
    });
    const name = h("p.weight-head", {}, `head ${nameOf(head)}`);
    return { el: h("div.weight-row", {}, name, h("div.weight-set", {}, ...bars)), bars, name };
  });
  const key = h(
    "div.key",
    {},
    h("span.key-item.key-weight", {}, "weight of an entry that is kept"),
    h("span.key-item.key-weight-gone", {}, "of one that is evicted"),
  );
  return {
    el: h("div.weight-bars", {}, ...rows.map((row) => row.el), key),
    update(masks, chosen) {
      rows.forEach(({ bars, name }, head) => {
        name.classList.toggle("hk-chosen", head === chosen);
        bars.forEach((bar, i) => {
          const kept = Boolean(masks[head][i]);
          bar.classList.toggle("hk-evicted-weight", !kept);
          const weight = i < m ? `weight ${figure(all[head][i])}` : "recent window";
          bar.setAttribute(
            "aria-label",
            `head ${nameOf(head)}, entry ${i}${named(i)}: ${weight}, ${kept ? "kept" : "evicted"}`,
          );
        });
      });
    },
  };
}
