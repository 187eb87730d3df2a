// SideBySide: the same bytes, split over the heads in several ways, and what the model answers with each.

import { bytesText, count, h, live, percent, shareSelection, slider, widgetRoot } from "./toolkit.js";
import { againstKey, headGrid, paintAgainst } from "./grid.js";
import { textStrip } from "./strip.js";

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const [steps, layers, heads, m] = get("_shape");
  const names = get("names");
  const shares = get("shares");
  const n = get("length");
  const full = layers * heads * n * get("bytes_per_entry");
  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const keptOf = maskReader(get("_kept"), [steps, layers, heads, m]);
  const choose = (layer, head) => put("selected", [layer, head]);

  const budget = slider({
    label: "Kept of the cache",
    name: "at",
    min: 0,
    max: steps - 1,
    step: 1,
    value: get("at"),
    format: (x) => `${percent(shares[x])} · ${bytesText(shares[x] * full)} of ${bytesText(full)}`,
    oninput: (x) => put("at", x),
  });

  const columns = names.map((name, c) =>
    column({
      name,
      layers,
      heads,
      n,
      tokens: get("tokens"),
      fact: get("fact"),
      answer: get("answer"),
      shares,
      lengths: get("lengths")[c],
      answers: get("answers")[c],
      right: get("right")[c],
      asked: get("asked"),
      stepMs: get("step_ms")[c],
      fullStepMs: get("full_step_ms"),
      kept: (step, layer, head) => keptOf(c, step, layer, head),
      choose,
    })
  );
  const root = widgetRoot(
    "side-by-side",
    get("title"),
    "Side by side",
    h("p.question", {}, h("span.asked", {}, "Asked afterwards: "), get("question")),
    h("p.question", {}, h("span.asked", {}, "The text says: "), h("strong", {}, get("expected"))),
    h("div.controls", {}, budget.el),
    h("div.columns", {}, ...columns.map((one) => one.el)),
    againstKey(),
  );
  budget.el.classList.add("hk-whole");
  el.append(root);

  function draw() {
    const step = get("at");
    const [layer, head] = get("selected");
    budget.set(step);
    columns.forEach((one) => one.draw(step, layer, head));
    root.dataset.state = JSON.stringify({ at: step, selected: [layer, head] });
    return `${percent(shares[step])} kept. ${columns.map((one) => one.words(step)).join(" ")}`;
  }
  return live(root, model, ["at", "selected"], draw, { stops: [shareSelection(model, layers, heads)] });
}

/** One way: its answer, how often it was right, its grid, and the fact as the chosen head keeps it. */
function column(
  {
    name,
    layers,
    heads,
    n,
    tokens,
    fact,
    answer,
    shares,
    lengths,
    answers,
    right,
    asked,
    stepMs,
    fullStepMs,
    kept,
    choose,
  },
) {
  const says = h("p.says");
  const whole = h("p.caption");
  const bars = right.map((x, step) =>
    h("span.often", { "data-tip": `${percent(shares[step])} kept: ${x} of ${asked} texts right` }, h("i"))
  );
  bars.forEach((bar, step) => bar.firstElementChild.style.setProperty("height", `${(100 * right[step]) / asked}%`));
  const often = h("p.caption");
  const speed = h("p.caption.speed");
  const speedWords = (step) =>
    stepMs.length ? `${ms(stepMs[step])} a step${fullStepMs === null ? "" : `, full cache ${ms(fullStepMs)}`}.` : "";
  const line = h("p.caption");
  const strip = textStrip({ n: tokens.length, tokens, facts: [[...fact, ""]] });
  let at = 0;
  const grid = headGrid({
    layers,
    heads,
    headNames: null,
    label: `What each KV head keeps: ${name}`,
    onselect: choose,
    paint: (cell, l, k) => {
      const length = lengths[at][l][k];
      paintAgainst(
        cell,
        length / (shares[at] * n),
        heads > 12 ? "" : count(length),
        `layer ${l}, head ${k}: keeps ${count(length)} of ${count(n)} entries, ` +
          `${(length / (shares[at] * n)).toFixed(1)} times the even share`,
      );
    },
  });
  const wholeHeads = (step) => {
    let found = 0;
    for (let l = 0; l < layers; l++) {
      for (let k = 0; k < heads; k++) found += Number(kept(step, l, k).subarray(...answer).every(Boolean));
    }
    return found;
  };
  return {
    el: h(
      "div.column",
      {},
      h("p.column-name", {}, name),
      says,
      whole,
      ...(stepMs.length ? [speed] : []),
      ...(bars.length ? [h("div.often-row", { "aria-hidden": "true" }, ...bars), often] : []),
      grid.el,
      line,
      strip.el,
    ),
    words: (step) =>
      `${name}: ${answers[step][0] ? "right" : "wrong"}, ${answers[step][1]}. ${speedWords(step)}`.trim(),
    draw(step, layer, head) {
      at = step;
      const [good, text] = answers[step];
      says.replaceChildren(
        h(
          `span.verdict.${good ? "right" : "wrong"}`,
          { role: "img", "aria-label": good ? "right" : "wrong" },
          good ? "✓" : "✗",
        ),
        ` ${text}`,
      );
      const flat = lengths[step].flat();
      const [least, most] = [Math.min(...flat), Math.max(...flat)];
      const sizes = most - least < 2
        ? `${count(most)} entries in each head`
        : `${count(least)} to ${count(most)} entries a head`;
      whole.textContent = `${sizes}. The answer is kept whole by ${wholeHeads(step)} of ${layers * heads} heads.`;
      speed.textContent = speedWords(step);
      bars.forEach((bar, i) => bar.classList.toggle("hk-now", i === step));
      often.textContent = right.length
        ? `Right on ${right[step]} of ${asked} such texts. Bars: ${percent(shares[0])} to ${
          percent(shares.at(-1))
        } kept.`
        : "";
      grid.paintAll();
      grid.select(layer, head);
      line.textContent = `The line in layer ${layer}, head ${head}:`;
      strip.update(kept(step, layer, head), 0);
    },
  };
}

/** Milliseconds, to three digits. */
const ms = (x) => `${x < 100 ? x.toPrecision(3) : count(x)} ms`;

/** Bits of all masks; answers those of one head as bytes of 0 and 1. */
function maskReader(view, [steps, layers, heads, m]) {
  const packed = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  const stride = Math.ceil(m / 8);
  return (column, step, layer, head) => {
    const from = (((column * steps + step) * layers + layer) * heads + head) * stride;
    return Uint8Array.from({ length: m }, (_, i) => (packed[from + (i >> 3)] >> (7 - (i & 7))) & 1);
  };
}

export default { render };
