// Roofline: measured times against the limit, the longer of reading the bytes and doing the arithmetic.

import { bytesText, choice, count, h, live, percent, widgetRoot } from "./toolkit.js";
import { foldedTable, linePlot } from "./lines.js";

/** @import { Model } from "./toolkit.js" */

const PREFIXES = { 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P" };
const three = (x) => (x < 100 ? x.toFixed(x < 10 ? 2 : 1) : count(x));
const timeText = (seconds) => (seconds < 1e-3 ? `${three(1e6 * seconds)} us` : `${three(1e3 * seconds)} ms`);
/** 4.56 TB/s, 428 TFLOP/s. */
function rateText(x, unit) {
  const power = Math.min(15, Math.max(0, 3 * Math.floor(Math.log10(x) / 3)));
  return `${three(x / 10 ** power)} ${PREFIXES[power]}${unit}`;
}

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const [ways, seconds, bandwidth, arithmetic] = ["ways", "seconds", "bandwidth", "arithmetic"].map(get);
  const cases = get("cases").map((given) => {
    const [reading, counting] = [given.bytes / bandwidth, given.operations / arithmetic];
    return { ...given, reading, counting, limit: Math.max(reading, counting) };
  });
  const intensity = (one) => one.operations / one.bytes;
  const intensities = cases.map(intensity);
  const ridge = arithmetic / bandwidth; // operations a byte at which the two limits are equal
  const slope = Math.max(...intensities) > 1.1 * Math.min(...intensities); // else all cases stand on one place of the roof

  const lines = ways.map((name, way) => ({
    name,
    way,
    cells: cases.map((one, at) => ({ ...one, at, took: seconds[way][at] })).filter(({ took }) => took !== null),
  }));
  const past = (one) => `${(one.took / one.limit).toFixed(1)} times the limit`;
  const sized = (one) => (get("across") ? `${get("across")}: ${one.name}` : one.name);
  const words = (line, one) => `${line.name} (${sized(one)}): ${timeText(one.took)}, ${past(one)}`;

  const views = choice({
    label: "Seen as",
    name: "view",
    options: [["time", "time", "seconds over the size"], [
      "speed",
      "speed",
      "operations a second over operations a byte",
    ]],
    value: get("view"),
    onchange: (name) => put("view", name),
  });
  const plot = linePlot({
    label: "Times against the limit",
    onpick: (line, point) => {
      model.set("case", lines[line].cells[point].at);
      put("way", line);
    },
  });
  const headline = h("p.map-says");
  const figures = h("p.map-figures");
  const bars = ["reading and writing the bytes", "doing the arithmetic", "measured"].map((name) => {
    const amount = h("span");
    const fill = h("div.tally-fill");
    return { fill, amount, el: h("div.tally", {}, h("span", {}, name), amount, h("div.tally-bar", {}, fill)) };
  });
  const folded = foldedTable("All figures of this picture");
  const root = widgetRoot(
    "roofline",
    get("title"),
    "Measured times against the limit",
    ...(slope ? [views.el] : []),
    plot.el,
    h("div.map-point", {}, headline, h("div.tallies", {}, ...bars.map((bar) => bar.el)), figures),
    folded.el,
    ...(get("machine") ? [h("p.caption.roof-machine", {}, get("machine"))] : []),
  );
  el.append(root);

  folded.update(
    [get("across"), "limit", ...ways],
    cases.map((one, at) => [
      one.name,
      timeText(one.limit),
      ...seconds.map((
        times,
      ) => (times[at] === null ? "" : `${timeText(times[at])} (${(times[at] / one.limit).toFixed(1)} x)`)),
    ]),
  );

  /** The picture in either view: places of a point, and the limit as a line. */
  function place() {
    if (slope && get("view") === "speed") {
      const x = (one) => Math.log2(intensity(one));
      const y = (one) => Math.log10(one.operations / one.took);
      const all = lines.flatMap((line) => line.cells.map(y));
      const ends = span(cases.map(x), 0.4);
      const roof = (at) => Math.log10(Math.min(arithmetic, 2 ** at * bandwidth));
      const bend = Math.min(ends[1], Math.max(ends[0], Math.log2(ridge)));
      const limit = /** @type {[number, number][]} */ ([ends[0], bend, ends[1]].map((at) => [at, roof(at)]));
      const heights = span([...all, roof(bend)], 0.2);
      return {
        ends,
        heights,
        x,
        y,
        limit: limit.map(([at, height]) => clipped(at, height, heights[0], ends[0])),
        xTitle: "operations a byte; each step to the right is the same factor",
        yTitle: "operations a second; dotted: the limit",
        xTicks: doublings(ends),
        yTicks: decades(heights, (power) => rateText(10 ** power, "FLOP/s").replace(/\.0+ /, " ")),
      };
    }
    const x = (one) => Math.log2(one.operations);
    const y = (one) => Math.log10(one.took);
    const limit = cases.map((one) => /** @type {[number, number]} */ ([x(one), Math.log10(one.limit)]));
    return {
      ends: span(cases.map(x), 0.4),
      heights: span([...lines.flatMap((line) => line.cells.map(y)), ...limit.map(([, height]) => height)], 0.15),
      x,
      y,
      limit,
      xTitle: `${get("across") || "size"}; each step to the right is the same factor`,
      yTitle: "time, each step upward the same factor; dotted: the limit",
      xTicks: cases.map((one) => /** @type {[number, string]} */ ([x(one), one.name])),
      yTicks: null,
    };
  }

  function draw() {
    views.set(get("view"));
    const [way, at] = [get("way"), get("case")];
    const far = lines[way].cells.map((one) => Math.abs(one.at - at));
    const point = far.indexOf(Math.min(...far)); // where this case was not measured, the nearest
    const chosen = lines[way].cells[point];
    const { ends, heights, x, y, limit, xTitle, yTitle, xTicks, yTicks } = place();
    plot.update({
      lines: lines.map((line) => ({
        name: line.name,
        points: line.cells.map((one) => ({ x: x(one), y: y(one), words: words(line, one) })),
      })),
      chosen: [way, point],
      x: { title: xTitle, min: ends[0], max: ends[1], ticks: xTicks },
      y: {
        title: yTitle,
        min: heights[0],
        max: heights[1],
        ticks: yTicks ?? decades(heights, (power) => timeText(10 ** power).replace(/\.0+ /, " ")),
      },
      limit,
    }, get("view"));
    headline.textContent = `${words(lines[way], chosen)}.`;
    const byBytes = chosen.reading >= chosen.counting;
    figures.textContent = `${bytesText(chosen.bytes)}, ${three(intensity(chosen))} operations a byte. That is ` +
      `${byBytes ? "less" : "more"} than the ${three(ridge)} at which both limits meet, so the ` +
      `${byBytes ? "bytes set" : "arithmetic sets"} the limit. Measured: ${
        rateText(chosen.bytes / chosen.took, "B/s")
      }, ` +
      `${percent(chosen.bytes / chosen.took / bandwidth)} of what the memory gives, and ` +
      `${rateText(chosen.operations / chosen.took, "FLOP/s")}, ` +
      `${percent(chosen.operations / chosen.took / arithmetic, 1)} of what the machine can do.`;
    const parts = [chosen.reading, chosen.counting, chosen.took];
    bars.forEach(({ fill, amount }, i) => {
      fill.style.width = `${(100 * parts[i]) / Math.max(...parts)}%`;
      amount.textContent = timeText(parts[i]);
    });
    root.dataset.state = JSON.stringify({
      limits: cases.map((one) => one.limit),
      chosen: [way, chosen.at],
      past: chosen.took / chosen.limit,
    });
    return headline.textContent;
  }

  return live(root, model, ["way", "case", "view"], draw);
}

/** Least and most, with some room. @param {number[]} values @param {number} room @returns {[number, number]} */
const span = (values, room) => [Math.min(...values) - room, Math.max(...values) + room];

/** Where a rising roof enters the picture, if its beginning lies below. @returns {[number, number]} */
function clipped(at, height, floor, start) {
  const rise = Math.log10(2); // a doubling of operations a byte doubles the speed
  return at === start && height < floor ? [at + (floor - height) / rise, floor] : [at, height];
}

/** Ticks at powers of ten, or at 1, 2 and 5 of each where there are few. */
function decades([low, high], text) {
  const steps = high - low > 2.5 ? [1] : [1, 2, 5];
  const all = Array.from({ length: Math.ceil(high - low) + 2 }, (_, i) => Math.floor(low) + i)
    .flatMap((power) => steps.map((step) => power + Math.log10(step)));
  return all.filter((power) => power >= low && power <= high)
    .map((power) => /** @type {[number, string]} */ ([power, text(power)]));
}

/** Some eight ticks at most, at powers of two. */
function doublings([low, high]) {
  const every = Math.ceil((high - low) / 8);
  const all = Array.from({ length: Math.ceil(high - low) + 1 }, (_, i) => Math.ceil(low) + i);
  return all.filter((power) => power <= high - 0.03 * (high - low) && power % every === 0)
    .map((power) => /** @type {[number, string]} */ ([power, power < 0 ? `1/${2 ** -power}` : count(2 ** power)]));
}

export default { render };
