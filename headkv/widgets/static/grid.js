// The grid: one cell a KV head, layers downward, heads across. Choosing a cell selects that head everywhere.

import { h } from "./toolkit.js";

/**
 * A grid of cells with roving focus. `paint(cell, layer, head)` fills a cell; `onselect(layer, head)` is called
 * when the reader chooses one by pointer or by arrow keys.
 * @param {{ layers: number, heads: number, label: string, headNames: string[] | null,
 *   paint: (cell: HTMLElement, layer: number, head: number) => void,
 *   onselect: (layer: number, head: number) => void, cornerText?: string }} options
 */
export function headGrid({ layers, heads, label, headNames, paint, onselect, cornerText = "layer" }) {
  const compact = heads > 12;
  /** @type {HTMLElement[][]} */
  const cells = [];
  let chosen = [0, 0];
  const root = h(`div.grid${compact ? ".compact" : ""}`, {
    role: "grid",
    "aria-label": label,
    "aria-rowcount": layers + 1,
    "aria-colcount": heads + 1,
  });
  root.style.setProperty("--hk-heads", String(heads));

  const top = h("div.grid-row", { role: "row" }, h("span.grid-corner", { role: "columnheader" }, cornerText));
  for (let head = 0; head < heads; head++) {
    const text = compact && head % 4 ? "" : headNames?.[head] ?? String(head);
    top.append(h("span.grid-head", { role: "columnheader", "aria-label": `head ${headNames?.[head] ?? head}` }, text));
  }
  root.append(top);
  for (let layer = 0; layer < layers; layer++) {
    const row = h("div.grid-row", { role: "row" }, h("span.grid-side", { role: "rowheader" }, String(layer)));
    cells.push([]);
    for (let head = 0; head < heads; head++) {
      const cell = h("div.cell", { role: "gridcell", tabindex: -1, "data-layer": layer, "data-head": head });
      cells[layer].push(cell);
      row.append(cell);
    }
    root.append(row);
  }

  const mark = (on) => {
    const cell = cells[chosen[0]][chosen[1]];
    cell.tabIndex = on ? 0 : -1;
    cell.setAttribute("aria-selected", String(on));
    return cell;
  };
  const select = (layer, head) => {
    mark(false);
    chosen = [layer, head];
    return mark(true);
  };
  const cellOf = (target) => {
    const cell = target.closest?.("[data-layer]");
    return cell && root.contains(cell) ? [Number(cell.dataset.layer), Number(cell.dataset.head)] : null;
  };
  root.addEventListener("click", (event) => {
    const at = cellOf(event.target);
    if (!at) return;
    select(...at).focus({ preventScroll: true });
    onselect(at[0], at[1]);
  });
  root.addEventListener("keydown", (event) => {
    const [layer, head] = chosen;
    const to = {
      ArrowUp: [layer - 1, head],
      ArrowDown: [layer + 1, head],
      ArrowLeft: [layer, head - 1],
      ArrowRight: [layer, head + 1],
      Home: [layer, 0],
      End: [layer, heads - 1],
      PageUp: [Math.max(0, layer - 10), head],
      PageDown: [Math.min(layers - 1, layer + 10), head],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    if (!cells[to[0]]?.[to[1]]) return;
    select(...to).focus();
    onselect(to[0], to[1]);
  });

  return {
    el: root,
    select,
    cellOf,
    paintAll() {
      cells.forEach((row, layer) => row.forEach((cell, head) => paint(cell, layer, head)));
    },
  };
}

/**
 * Fill a cell: `level` in [0, 1] gives its colour, `text` its number, or its bar where cells are too small for one.
 * No shade lies between the darkest that bears dark ink and the lightest that bears light ink.
 */
export function paintLevel(cell, level, text, description) {
  cell.className = "hk-cell";
  cell.style.setProperty("--hk-level", `${(100 * level).toFixed(1)}%`);
  const deep = level > 0.42;
  const shade = deep ? 82 + (18 * (level - 0.42)) / 0.58 : 6 + 42 * (level / 0.42) ** 0.75;
  cell.style.setProperty("--hk-shade", `${shade.toFixed(1)}%`);
  cell.classList.toggle("hk-deep", deep);
  cell.textContent = text;
  cell.setAttribute("aria-label", description);
}

/** Fill a cell on both sides of zero: `level` in [-1, 1], what is less than zero in another colour and hatched. */
export function paintSigned(cell, level, text, description) {
  paintLevel(cell, Math.abs(level), text, description);
  cell.classList.toggle("hk-minus", level < 0);
}

/** Fill a cell by its part of the even share: more is stronger, fewer is hatched; `text` is its number. */
export function paintAgainst(cell, ratio, text, description) {
  const kind = ratio >= 4
    ? "more-3"
    : ratio >= 2
    ? "more-2"
    : ratio >= 1.1
    ? "more-1"
    : ratio > 0.9
    ? "even"
    : ratio > 0.5
    ? "less-1"
    : "less-2";
  cell.className = `hk-cell hk-against hk-${kind}`;
  cell.textContent = text;
  cell.setAttribute("aria-label", description);
}

/** How to read cells that are filled against the even share. */
export function againstKey() {
  const item = (kind, text) => h("span.key-item", {}, h(`span.cell.sample.${kind}`), ` ${text}`);
  return h(
    "div.key",
    {},
    item("less-2", "half the even share or less"),
    item("less-1", "fewer"),
    item("even", "even"),
    item("more-1", "more"),
    item("more-2", "twice"),
    item("more-3", "four times or more"),
  );
}
