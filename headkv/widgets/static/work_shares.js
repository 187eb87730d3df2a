// WorkShares: multiprocessors over time. One program a row against equal shares, cut as the Triton kernel cuts them if there is no gap between rows.

import { choice, count, h, live, percent, s, slider, throttle, times, widgetRoot } from "./toolkit.js";

const UNIT = 4; // shares are whole units of entries
const MOST = 132;

/** @typedef {[row: number, begin: number, end: number]} Segment */

/**
 * For each program the segments of its share: see `equal_shares` in work_shares.py.
 * @param {number[]} lengths
 * @param {number} programs
 */
function equalShares(lengths, programs) {
  const units = lengths.map((n) => Math.max(1, Math.ceil(n / UNIT)));
  const share = Math.ceil(units.reduce((a, b) => a + b) / programs);
  /** @type {Segment[][]} */
  const served = Array.from({ length: programs }, () => []);
  let first = 0;
  lengths.forEach((length, row) => {
    const last = first + units[row];
    for (let p = Math.floor(first / share); p < Math.ceil(last / share); p++) {
      const begin = Math.max(p * share, first) - first;
      const end = Math.min((p + 1) * share, last) - first;
      served[p].push([row, begin * UNIT, Math.min(end * UNIT, length)]);
    }
    first = last;
  });
  return served;
}

/**
 * Whole rows, one after another, each to the multiprocessor that is free first.
 * @param {number[]} lengths
 * @param {number} processors
 */
function wholeRows(lengths, processors) {
  /** @type {Segment[][]} */
  const served = Array.from({ length: processors }, () => []);
  const busy = served.map(() => 0);
  lengths.forEach((length, row) => {
    const free = busy.indexOf(Math.min(...busy));
    served[free].push([row, 0, length]);
    busy[free] += length;
  });
  return served;
}

/**
 * Lengths between equal (0) and as given (1), with about the same sum.
 * @param {number[]} lengths
 * @param {number} skew
 */
function skewed(lengths, skew) {
  const total = lengths.reduce((a, b) => a + b);
  const powers = lengths.map((n) => n ** skew);
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((x) => Math.max(1, Math.round((total * x) / sum)));
}

const readBy = (segments) => segments.reduce((sum, [, begin, end]) => sum + end - begin, 0);

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const put = (name, value) => {
    model.set(name, value);
    sync();
  };
  const sync = throttle(() => model.save_changes(), 150);
  let zoomed = false;
  const processors = slider({
    label: "Multiprocessors",
    name: "multiprocessors",
    min: 4,
    max: MOST,
    step: 4,
    value: get("multiprocessors"),
    format: count,
    oninput: (x) => put("multiprocessors", x),
  });
  const skew = slider({
    label: "Row lengths",
    name: "skew",
    min: 0,
    max: 1,
    step: 0.05,
    value: get("skew"),
    format: (x) => (x === 0 ? "equal" : x === 1 ? "as they are" : `${percent(x)} skewed`),
    oninput: (x) => put("skew", x),
  });
  const axis = choice({
    label: "Time axis",
    name: "axis",
    value: "same",
    options: [["same", "Shared", "The same scale above and below"], [
      "own",
      "Each its own",
      "Both drawn to full width",
    ]],
    onchange: (x) => {
      zoomed = x === "own";
      draw();
    },
  });
  const panels = ["One program a row", "Equal shares of all entries"].map((name) => {
    const facts = h("span");
    const plot = s("svg.work-plot", { preserveAspectRatio: "none", role: "img" });
    const ticks = h("div.work-ticks");
    return {
      name,
      facts,
      plot,
      ticks,
      el: h("div.work-panel", {}, h("p.work-head", {}, h("b", {}, name), " ", facts), plot, ticks),
    };
  });
  const story = h("p.story");
  const root = widgetRoot(
    "work-shares",
    get("title"),
    "Who works, who waits",
    h("div.controls", {}, processors.el, skew.el, axis.el),
    story,
    ...panels.map((p) => p.el),
    h(
      "div.key",
      {},
      h("span.key-item.key-works", {}, "works; rows alternate in shade"),
      h("span.key-item.key-waits", {}, "waits for the slowest"),
      h("span.key-item.key-ended", {}, "launch ended"),
    ),
  );
  el.append(root);

  function draw() {
    const number = get("multiprocessors");
    const lengths = skewed(get("lengths"), get("skew"));
    const ways = [wholeRows(lengths, number), equalShares(lengths, number)];
    const ends = ways.map((served) => Math.max(...served.map(readBy)));
    const total = lengths.reduce((a, b) => a + b);
    ways.forEach((served, i) =>
      drawPanel(panels[i], served, ends[i], zoomed ? ends[i] : Math.max(...ends), total / number / ends[i])
    );
    const gain = ends[0] / ends[1];
    story.textContent =
      `${times(lengths.length, "row")}, ${count(total)} entries. Equal shares end ${gain.toFixed(gain < 10 ? 1 : 0)} ` +
      "times sooner: the longest row alone decides above, the sum of all below.";
    model.set("state", { lengths, rows: ways[0], shares: ways[1], ends });
    root.dataset.state = JSON.stringify({ lengths, ends });
    processors.set(number);
    skew.set(get("skew"));
    sync();
    const facts = panels.map((p) => `${p.name}: ${p.facts.textContent}`).join(" ");
    return `${number} multiprocessors. ${facts} ${story.textContent}`;
  }

  return live(root, model, ["lengths", "multiprocessors", "skew"], draw, { stops: [sync.cancel] });
}

/** One strip: a lane for each multiprocessor, `width` entries wide, of which the launch takes the first `end`. */
function drawPanel({ name, facts, plot, ticks }, served, end, width, busy) {
  const lane = served.length > 40 ? 1 : 0.86; // many lanes touch
  const x = (entries) => (1000 * entries) / width;
  const rects = served.flatMap((segments, p) => {
    let at = 0;
    return segments.map(([row, begin, stop]) => {
      const rect = s(`rect.work-${row % 2 ? "odd" : "even"}`, {
        x: x(at),
        y: p + (1 - lane) / 2,
        width: x(stop - begin),
        height: lane,
        "data-tip": `multiprocessor ${p}: row ${row}, entries ${count(begin)} to ${count(stop)}`,
      });
      at += stop - begin;
      return rect;
    });
  });
  plot.setAttribute("viewBox", `0 0 1000 ${served.length}`);
  plot.style.height = `${Math.min(200, 16 * served.length)}px`;
  const waits = s("rect.work-waits", {
    x: 0,
    y: 0,
    width: x(end),
    height: served.length,
    "data-tip": "waits for the slowest",
  });
  plot.replaceChildren(waits, ...rects);
  plot.style.setProperty("--hk-end", `${(100 * end) / width}%`);
  const working = served.filter((segments) => segments.length).length;
  facts.textContent = `${working} of ${served.length} work; they are busy ${percent(busy)} of the time until the end.`;
  plot.setAttribute("aria-label", `${name}: ${facts.textContent} The slowest reads ${count(end)} entries.`);
  const share = end / width;
  const mark = h(
    `span.work-tick${share > 0.7 ? ".work-tick-left" : ""}`,
    {},
    `${share > 0.7 ? "" : "▲ "}ends after ${count(end)} entries${share > 0.7 ? " ▲" : ""}`,
  );
  // The arrow's point is 5 pixels inside its mark: at the very end it stays within the frame.
  if (share > 0.7) mark.style.right = `max(5px, ${100 * (1 - share)}%)`;
  else mark.style.left = `${100 * share}%`;
  ticks.replaceChildren(mark);
}

export default { render };
