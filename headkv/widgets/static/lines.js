// Lines of measured points, with intervals: each line has its own sign, each point can be chosen by pointer or by keys.

import { h, s } from "./toolkit.js";

const SIGNS = "●■▲◆▼★✚✖○□△◇▽☆⊕⊗⊞⊠";

/**
 * @typedef {{ x: number, y: number, low?: number, high?: number, words: string }} Point
 * @typedef {{ name: string, dotted?: boolean, points: Point[] }} Line
 * @typedef {{ title: string, min: number, max: number, ticks: [number, string][] }} Axis
 */

/** The sign of line number i. @param {number} i */
export const signOf = (i) => SIGNS[i % SIGNS.length];

/**
 * `update` draws; `onpick(line, point)` is called when the reader chooses a point or a name.
 * Left and right go along a line, up and down to the line that is next in height there.
 * @param {{ label: string, onpick: (line: number, point: number) => void }} options
 */
export function linePlot({ label, onpick }) {
  const drawing = s("svg.lines-drawing", {
    viewBox: "0 0 100 100",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  const dots = h("div.lines-dots", { role: "group", "aria-label": label });
  const ticks = h("div.lines-ticks", { "aria-hidden": "true" });
  const across = h("p.caption");
  const up = h("p.caption.lines-up");
  const names = h("div.lines-names", { role: "group", "aria-label": "Lines" });
  /** @type {{ lines: Line[], x: Axis, y: Axis, chosen: [number, number], level?: number, levelText?: string,
   *   limit?: [number, number][] }} */
  let now;
  let drawn = null;
  /** @type {HTMLButtonElement[][]} */
  let buttons = [];
  let paths = [];
  let labels = [];

  const left = (x) => (100 * (x - now.x.min)) / (now.x.max - now.x.min);
  const top = (y) => 100 - (100 * (y - now.y.min)) / (now.y.max - now.y.min);
  const flat = (y, kind) => s(`line.${kind}`, { x1: 0, x2: 100, y1: top(y), y2: top(y) });

  function rebuild() {
    paths = now.lines.map((line) =>
      s(
        `g.line${line.dotted ? ".line-dotted" : ""}`,
        {},
        s("polyline", { points: line.points.map((p) => `${left(p.x)},${top(p.y)}`).join(" ") }),
        ...line.points.filter((p) => p.low !== undefined).map((p) =>
          s("line.spread", { x1: left(p.x), x2: left(p.x), y1: top(p.low), y2: top(p.high) })
        ),
      )
    );
    const level = now.level === undefined ? [] : [flat(now.level, "line-level")];
    const limit = (now.limit ?? []).map(([x, y]) => `${left(x)},${top(y)}`).join(" ");
    const bent = limit ? [s("polyline.line-level", { points: limit })] : [];
    drawing.replaceChildren(...now.y.ticks.map(([y]) => flat(y, "line-tick")), ...level, ...bent, ...paths);
    buttons = now.lines.map((line, i) =>
      line.points.map((p, j) => {
        const dot = h("button.dot", { type: "button", tabindex: -1, "aria-label": p.words, "data-at": `${i},${j}` });
        dot.style.left = `${left(p.x)}%`;
        dot.style.top = `${top(p.y)}%`;
        dot.textContent = signOf(i);
        return dot;
      })
    );
    dots.replaceChildren(...buttons.flat());
    ticks.replaceChildren(
      ...now.x.ticks.map(([x, text]) => placed("lines-x", "left", left(x), text)),
      ...now.y.ticks.map(([y, text]) => placed("lines-y", "top", top(y), text)),
      ...(now.levelText ? [placed("lines-level", "top", top(now.level), now.levelText)] : []),
    );
    labels = now.lines.map((line, i) =>
      h(
        "button.lines-name",
        { type: "button", onclick: () => onpick(i, Math.min(now.chosen[1], line.points.length - 1)) },
        h("span", { "aria-hidden": "true" }, `${signOf(i)} `),
        line.name,
      )
    );
    names.replaceChildren(...labels);
    across.textContent = now.x.title;
    up.textContent = now.y.title;
  }

  dots.addEventListener("click", (event) => {
    const at = /** @type {HTMLElement} */ (event.target).dataset?.at;
    if (!at) return;
    const [line, point] = at.split(",").map(Number);
    onpick(line, point);
  });
  dots.addEventListener("keydown", (event) => {
    const [i, j] = now.chosen;
    const along = { ArrowLeft: j - 1, ArrowRight: j + 1, Home: 0, End: now.lines[i].points.length - 1 }[event.key];
    const upward = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (along === undefined && upward === undefined) return;
    event.preventDefault();
    if (along !== undefined && now.lines[i].points[along]) onpick(i, along);
    if (upward !== undefined) {
      const order = now.lines.map((_, k) => k).filter((k) => now.lines[k].points[j])
        .sort((a, b) => now.lines[a].points[j].y - now.lines[b].points[j].y || b - a);
      const next = order[order.indexOf(i) + upward];
      if (next !== undefined) onpick(next, j);
    }
    buttons[now.chosen[0]][now.chosen[1]].focus();
  });

  return {
    el: h("div.lines", {}, up, h("div.lines-frame", {}, drawing, ticks, dots), across, names),
    /**
     * @param {{ lines: Line[], x: Axis, y: Axis, chosen: [number, number], level?: number, levelText?: string,
     *   limit?: [number, number][] }} given `level` is a line across, with its words; `limit` a dotted one through points
     * @param {string} key of what is drawn: where it is the same, only the choice is new
     */
    update(given, key) {
      now = given;
      if (key !== drawn) rebuild();
      drawn = key;
      const [i, j] = now.chosen;
      drawing.append(paths[i]); // over the others
      buttons.forEach((line, k) =>
        line.forEach((dot, m) => {
          dot.classList.toggle("hk-of-chosen", k === i);
          dot.setAttribute("aria-pressed", String(k === i && m === j));
          dot.tabIndex = k === i && m === j ? 0 : -1;
        })
      );
      paths.forEach((path, k) => path.classList.toggle("hk-of-chosen", k === i));
      labels.forEach((name, k) => name.setAttribute("aria-pressed", String(k === i)));
    },
  };
}

function placed(kind, side, at, text) {
  const label = h(`span.${kind}`, {}, text);
  label.style[side] = `${at}%`;
  return label;
}

/**
 * A table of figures that scrolls where it is too wide.
 * @param {string} label
 */
export function figureTable(label) {
  const table = h("table.figures");
  return {
    el: h("div.scroll", { tabindex: 0, role: "region", "aria-label": label }, table),
    /** @param {string[]} head @param {string[][]} rows each with its name first */
    update(head, rows) {
      table.replaceChildren(
        h("thead", {}, h("tr", {}, ...head.map((text) => h(text ? "th" : "td", text ? { scope: "col" } : {}, text)))),
        h(
          "tbody",
          {},
          ...rows.map(([name, ...cells]) =>
            h("tr", {}, h("th", { scope: "row" }, name), ...cells.map((text) => h("td", {}, text)))
          ),
        ),
      );
    },
  };
}

/**
 * The same, folded away.
 * @param {string} summary
 */
export function foldedTable(summary) {
  const { el, update } = figureTable(summary);
  return { el: h("details.more", {}, h("summary", {}, summary), el), update };
}
