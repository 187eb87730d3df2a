// HeadGrid: the grid alone, for any number or kind a head has, with all heads in order beside it.

import { count, h, live, percent, s, shareSelection, widgetRoot } from "./toolkit.js";
import { headGrid, paintLevel, paintSigned } from "./grid.js";

const MARKS = ["■", "□", "◆", "○", "▲", "✕"];

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const [layers, heads] = get("_shape");
  const values = get("values");
  const kinds = get("kinds");
  const headNames = get("head_names").length ? get("head_names") : null;
  const nameOf = (k) => headNames?.[k] ?? k;
  const flat = values.flat();
  const low = Math.min(0, ...flat);
  const high = Math.max(...flat, low + 1e-12);
  const order = flat.map((_, i) => i).sort((a, b) => flat[b] - flat[a] || a - b);
  const digits = flat.every(Number.isInteger) ? 0 : 2;
  const said = (x) => (digits ? (Math.abs(x) < 0.005 && x !== 0 ? x.toPrecision(2) : x.toFixed(digits)) : count(x));
  const measure = get("label") || (kinds.length ? "Kind of each KV head" : "Score of each KV head");

  const wordsOf = (l, k) => {
    const value = values[l][k];
    if (kinds.length) return `layer ${l}, head ${nameOf(k)}: ${kinds[value]}`;
    return `layer ${l}, head ${nameOf(k)}: ${said(value)}, number ${count(order.indexOf(l * heads + k) + 1)} of ${
      count(flat.length)
    }`;
  };
  const grid = headGrid({
    layers,
    heads,
    headNames,
    label: measure,
    onselect: (l, k) => {
      model.set("selected", [l, k]);
      model.save_changes();
    },
    paint: (cell, l, k) => {
      const value = values[l][k];
      if (!kinds.length) {
        const text = heads > 12 ? "" : (digits ? value.toFixed(digits) : count(value)).replace(/^-(0\.0+)$/, "$1");
        if (low < 0) return paintSigned(cell, value / Math.max(-low, high), text, wordsOf(l, k));
        return paintLevel(cell, value / high, text, wordsOf(l, k));
      }
      cell.classList.add("hk-kind", `hk-kind-${value}`);
      cell.textContent = heads > 12 ? "" : MARKS[value];
      cell.setAttribute("aria-label", wordsOf(l, k));
    },
  });

  const chosen = h("p.chosen-line");
  const side = kinds.length ? kindCounts(kinds, flat) : rankedBars(order, flat, low, high, (i) => grid.pick(i));
  const root = widgetRoot(
    "head-grid",
    get("title"),
    measure,
    h(
      "div.stage",
      {},
      h("div.stage-grid", {}, h("p.caption", {}, measure), grid.el),
      h("div.stage-side", {}, chosen, side.el),
    ),
  );
  el.append(root);
  grid.paintAll();

  grid.pick = (i) => {
    model.set("selected", [Math.floor(i / heads), i % heads]);
    model.save_changes();
  };
  const draw = () => {
    const [l, k] = get("selected");
    grid.select(l, k);
    const words = wordsOf(l, k);
    chosen.textContent = words.charAt(0).toUpperCase() + words.slice(1);
    side.update(l * heads + k);
    root.dataset.selected = `${l},${k}`;
    return words;
  };
  return live(root, model, ["selected"], draw, {
    describe: (target) => side.describe(target, wordsOf, heads),
    stops: [shareSelection(model, layers, heads)],
  });
}

/** Every head as a bar, highest first; the chosen one stands out by colour and by a mark above it. */
function rankedBars(order, flat, low, high, onpick) {
  const n = flat.length;
  const y = (value) => 100 - (100 * (value - low)) / (high - low);
  const bars = order.map((i, at) =>
    s(`rect.rank-bar${flat[i] < 0 ? ".rank-minus" : ""}`, {
      x: at + 0.1,
      width: 0.8,
      y: Math.min(y(flat[i]), y(0)),
      height: Math.max(0.6, Math.abs(y(0) - y(flat[i]))),
      "data-rank": i,
      onclick: () => onpick(i),
    })
  );
  const here = h("span.rank-here", { "aria-hidden": "true" }, "▼");
  const svg = s("svg.rank-plot", {
    viewBox: `0 0 ${n} 100`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `All ${n} heads, highest first`,
  }, ...bars);
  const sum = flat.reduce((a, b) => a + b, 0);
  const top = Math.max(1, Math.round(n * 0.05));
  const held = low >= 0 && sum > 0 ? order.slice(0, top).reduce((a, i) => a + flat[i], 0) / sum : null;
  const note = held === null
    ? "All heads, highest first."
    : `All ${n} heads, highest first. The top ${top} hold ${percent(held)} of the sum.`;
  return {
    el: h("div.rank", {}, h("div.rank-frame", {}, here, svg), h("p.caption", {}, note)),
    update(i) {
      const at = order.indexOf(i);
      bars.forEach((bar, j) => bar.classList.toggle("hk-chosen-bar", j === at));
      here.style.left = `${(100 * (at + 0.5)) / n}%`;
    },
    describe: (target, wordsOf, heads) => {
      const i = target.dataset?.rank;
      return i === undefined ? null : wordsOf(Math.floor(i / heads), i % heads);
    },
  };
}

/** How many heads there are of each kind, with the sign that stands for it. */
function kindCounts(kinds, flat) {
  const rows = kinds.map((kind, i) => {
    const number = flat.filter((value) => value === i).length;
    return h(
      "li.kind-row",
      {},
      h("span", { class: `hk-cell hk-kind hk-kind-${i}`, "aria-hidden": "true" }, MARKS[i]),
      h("span", {}, `${kind}: ${count(number)} of ${count(flat.length)} heads, ${percent(number / flat.length)}`),
    );
  });
  return {
    el: h("ul.kinds", {}, ...rows),
    update: (i) => rows.forEach((row, kind) => row.classList.toggle("hk-current", kind === flat[i])),
    describe: () => null,
  };
}

export default { render };
