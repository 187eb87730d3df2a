// BudgetExplorer: who keeps what, as a reader moves the budget. All of it is computed here, in the page.

import {
  announcer,
  bytesText,
  choice,
  count,
  follow,
  h,
  percent,
  picker,
  shareSelection,
  slider,
  throttle,
  times,
  tooltip,
  widgetRoot,
} from "./toolkit.js";
import { entriesOf, keptMask, makePlan, packKept, Scores } from "./plan.js";
import { againstKey, headGrid, paintAgainst, paintLevel } from "./grid.js";
import { overview, textStrip } from "./strip.js";
import { billBar } from "./bill.js";
import { slotRace } from "./slots.js";
import { weightBars } from "./weight_bars.js";

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const [layers, heads, m] = get("_shape");
  const window_ = get("window");
  const n = m + window_;
  const headNames = get("head_names")?.length ? get("head_names") : null;
  const tokens = get("tokens")?.length ? get("tokens") : null;
  const facts = get("facts");
  const small = layers === 1 && n <= 12; // a case by hand: every weight of every head is drawn
  const scores = new Scores(get("_scores"), [layers, heads, m], get("_exponent"));
  const nameOf = (head) => headNames?.[head] ?? head;

  const setting = () => ({
    budget: get("budget"),
    safeguard: get("safeguard"),
    pooling: get("pooling"),
    kernel: get("kernel_size"),
    allocator: get("allocator"),
    window: window_,
  });
  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };

  let now = setting();
  let plan = makePlan(scores, now);
  let [layer, head] = get("selected");
  let masks = [];

  const budget = slider({
    label: "Budget",
    name: "budget",
    min: n < 100 ? 1 / n : 0.01,
    max: 1,
    step: n < 100 ? 1 / n : 0.01, // no step that changes nothing
    value: now.budget,
    format: (x) =>
      `${percent(x, Number.isInteger(Math.round(x * 1e6) / 1e4) ? 0 : 1)} · ${count(entriesOf(x, n))} a head`,
    oninput: (x) => put("budget", n < 100 ? Math.round(x * n) / n : x),
  });
  const allocator = choice({
    label: "Who gets the slots",
    name: "allocator",
    value: now.allocator,
    options: [["uniform", "Uniform", "SnapKV: every head the same"], [
      "adaptive",
      "Ada-KV",
      "the best scores of a layer, whichever head has them",
    ]],
    onchange: (x) => put("allocator", x),
  });
  const safeguard = slider({
    label: "Safeguard",
    name: "safeguard",
    min: 0,
    max: 1,
    step: 0.05,
    value: now.safeguard,
    format: (x) => `${percent(x)} evenly`,
    oninput: (x) => put("safeguard", x),
  });
  const pooling = choice({
    label: "Pooling of scores",
    name: "pooling",
    value: now.pooling,
    options: [["max", "Max"], ["avg", "Mean"], ["none", "None"]],
    onchange: (x) => put("pooling", x),
  });
  const kernel = slider({
    label: "Kernel size",
    name: "kernel_size",
    min: 1,
    max: 31,
    step: 2,
    value: now.kernel,
    format: (x) => times(x, "entry", "entries"),
    oninput: (x) => put("kernel_size", x),
  });

  const cells = choice({
    label: "Cells show",
    name: "cells",
    value: get("cells"),
    options: [["entries", "Entries", "entries that the head keeps"], [
      "attention",
      "Attention",
      "share of the head's attention that they hold",
    ]],
    onchange: (x) => put("cells", x),
  });
  const controls = { budget, allocator, safeguard, pooling, kernel_size: kernel };
  Object.entries({ ...controls, cells }).forEach(([name, { el }]) => (el.hidden = !get("controls").includes(name)));
  budget.el.classList.add("hk-wide");

  const choose = (toLayer, toHead) => put("selected", [toLayer, toHead]);
  const grid = headGrid({
    layers,
    heads,
    headNames,
    label: "What each KV head keeps",
    onselect: choose,
    paint: (cell, l, k) => {
      const [length, held] = [plan.lengths[l][k], plan.held[l][k]];
      const even = (plan.kept / plan.total) * n;
      const words = `layer ${l}, head ${nameOf(k)}: keeps ${count(length)} of ${count(n)} entries, ` +
        `${(length / even).toFixed(1)} times the even share, and ${percent(held)} of its attention`;
      if (get("cells") === "entries") paintAgainst(cell, length / even, heads > 12 ? "" : count(length), words);
      else paintLevel(cell, held, heads > 12 ? "" : percent(held), words);
    },
  });

  const layerPick = picker({
    label: "Layer",
    name: "layer",
    value: layer,
    options: Array.from({ length: layers }, (_, i) => [i, String(i)]),
    onchange: (x) => choose(Number(x), head),
  });
  const headPick = picker({
    label: "head",
    name: "head",
    value: head,
    options: Array.from({ length: heads }, (_, i) => [i, String(nameOf(i))]),
    onchange: (x) => choose(layer, Number(x)),
  });
  layerPick.el.hidden = layers === 1;
  const caption = h("p.caption");
  const headLine = h("span.head-line");
  const cellKey = againstKey();
  const bars = small ? weightBars({ scores, heads, nameOf, n, m, tokens }) : null;
  const strip = tokens && !small ? textStrip({ n, tokens, facts }) : null;
  const lines = overview({
    n,
    heads,
    nameOf: (k) => `head ${nameOf(k)}`,
    facts,
    onselect: (k) => choose(layer, k),
    onlocate: (i) => strip?.reveal(i),
  });
  const bill = billBar({ marks: get("answers") });
  const race = slotRace({ heads, headNames, m });
  const story = h("p.story");
  const status = announcer();
  const data = h("script.state", { type: "application/json" });

  const raceBox = h(
    "details.more",
    { ontoggle: () => (raceBox.open ? drawRace() : race.stop()) },
    h("summary", {}, "Watch the slots of this layer go, one by one"),
    race.el,
  );
  const root = widgetRoot(
    "explorer",
    get("title"),
    "Budget explorer",
    h("div.pinned", {}, budget.el, bill.el),
    h("div.controls", {}, ...Object.values(controls).slice(1).map((c) => c.el)),
    story,
    h(
      "div.stage",
      {},
      h("div.stage-grid", {}, cells.el, caption, grid.el, cellKey),
      h(
        "div.stage-strip",
        {},
        h("div.strip-head", {}, layerPick.el, headPick.el, headLine),
        bars ? bars.el : lines.el,
        ...(strip ? [strip.el, stripKey(facts, window_)] : []),
      ),
    ),
    raceBox,
    status.el,
    data,
  );
  el.append(root);
  bill.el.hidden = small; // a few bytes say nothing
  raceBox.hidden = !get("controls").includes("slots");
  raceBox.open = small && !raceBox.hidden;

  function drawRace() {
    race.update(scores.ranked(layer, now.pooling, now.kernel), {
      slots: plan.slots,
      budgets: plan.budgets[layer],
      allocator: now.allocator,
      unit: scores.unit,
    });
  }

  function drawHead() {
    grid.select(layer, head);
    layerPick.set(layer);
    headPick.set(head);
    masks = Array.from({ length: heads }, (_, k) => keptMask(scores, plan, now, layer, k));
    lines.update(masks, plan.lengths[layer].map(count), head);
    bars?.update(masks, head);
    strip?.update(masks[head], plan.recent);
    const length = plan.lengths[layer][head];
    const holds = (mask, [a, b]) => mask.subarray(a, b).every(Boolean);
    const found = facts.filter((fact) => holds(masks[head], fact)).length;
    headLine.textContent =
      `keeps ${count(length)} of ${count(n)} entries, ${percent(plan.held[layer][head])} of its attention` +
      (facts.length ? `, and ${found} of ${times(facts.length, "fact")} whole` : "");
    if (raceBox.open) drawRace();
  }

  const words = () => {
    const flat = plan.lengths.flat();
    const who = now.allocator === "uniform" ? "Uniform budgets keep" : "Ada-KV keeps";
    const gain = plan.mass - plan.evenMass;
    const compare = now.allocator === "uniform"
      ? ""
      : Math.abs(gain) < 5e-4
      ? "; uniform budgets hold as much"
      : `; uniform budgets would hold ${percent(plan.evenMass, 1)}`;
    const [least, most] = [Math.min(...flat), Math.max(...flat)];
    return `${who} ${count(plan.kept)} of ${count(plan.total)} entries: ${least < most ? `${count(least)} to ` : ""}` +
      `${count(most)} a head. They hold ${percent(plan.mass, 1)} of the attention${
        window_ ? " on entries before the recent window" : ""
      }${compare}.`;
  };

  /** In how many heads each fact stands whole: what an answer can be read from. */
  function wholeFacts() {
    if (!facts.length) return "";
    const whole = new Array(facts.length).fill(0);
    for (let l = 0; l < layers; l++) {
      for (let k = 0; k < heads; k++) {
        const mask = keptMask(scores, plan, now, l, k);
        facts.forEach(([a, b], f) => (whole[f] += Number(mask.subarray(a, b).every(Boolean))));
      }
    }
    const said = whole.map((x, f) => (whole.length > 1 ? `fact ${f + 1} by ${count(x)}` : `by ${count(x)}`));
    return `${facts.length > 1 ? "Kept whole:" : "The fact is kept whole"} ${said.join(", ")} of ` +
      `${times(layers * heads, "head")}. `;
  }

  function drawAnswers() {
    const marks = get("answers").filter((mark) => mark.allocator === now.allocator);
    if (!marks.length) return "";
    const nearest = marks.reduce((a, b) => (Math.abs(b.share - now.budget) < Math.abs(a.share - now.budget) ? b : a));
    return `Measured beforehand, nearest setting: ${nearest.text}.`;
  }

  function drawPlan() {
    plan = makePlan(scores, now);
    const byEntries = get("cells") === "entries";
    caption.textContent = `${byEntries ? "Entries" : "Attention"} kept by each KV head`;
    cellKey.hidden = !byEntries;
    grid.paintAll();
    const entry = get("bytes_per_entry");
    const share = plan.kept / plan.total;
    bill.update({
      kept: plan.kept * entry,
      full: plan.total * entry,
      share,
      room: layers * heads * get("headroom") * entry,
      text: wholeFacts() + drawAnswers(),
      shows: (mark) => mark.allocator === now.allocator,
      words: `${bytesText(plan.kept * entry)} of ${bytesText(plan.total * entry)}: ${
        percent(share, 1)
      } of the full cache`,
    });
    story.textContent = words();
    status.say(words());
    safeguard.input.disabled = now.allocator === "uniform";
    kernel.input.disabled = now.pooling === "none";
    drawHead();
    publish();
  }

  /** What tests and Python read: budgets and the chosen head's kept positions in the page, all of it on the model. */
  const sync = throttle(() => {
    model.set("budgets", plan.lengths);
    model.set("kept", packKept(scores, plan, now));
    model.save_changes();
  }, 120);
  function publish() {
    const positions = Array.from(masks[head].keys()).filter((i) => masks[head][i]);
    data.textContent = JSON.stringify({ ...now, selected: [layer, head], budgets: plan.lengths, kept: positions });
    sync();
  }

  const drop = [
    shareSelection(model, layers, heads),
    follow(model, ["budget", "safeguard", "pooling", "kernel_size", "allocator", "cells"], () => {
      now = setting();
      budget.set(now.budget);
      safeguard.set(now.safeguard);
      pooling.set(now.pooling);
      kernel.set(now.kernel);
      allocator.set(now.allocator);
      cells.set(get("cells"));
      drawPlan();
    }),
    follow(model, ["selected"], () => {
      [layer, head] = get("selected");
      drawHead();
      publish();
    }),
  ];

  tooltip(root, (target, event) => {
    const over = lines.positionOf(target, event);
    const entry = over ? over.position : strip?.entryOf(target);
    if (entry !== null && entry !== undefined) return describeEntry(entry, over ? over.head : head);
    return null;
  });
  function describeEntry(i, k) {
    const text = tokens ? `“${tokens[i].trim() || tokens[i].replace(/\n/g, "↵")}” · ` : "";
    const state = masks[k][i] ? "kept" : "evicted";
    if (i >= m) return `${text}entry ${count(i)} · recent window · ${state}`;
    const ranked = scores.ranked(layer, now.pooling, now.kernel).heads[k];
    const score = scores.row(layer, k)[i] * scores.unit;
    return `${text}entry ${count(i)} · head ${nameOf(k)} · score ${score.toPrecision(2)} · ` +
      `rank ${count(ranked.best.indexOf(i) + 1)} of ${count(m)} · ${state}`;
  }

  drawPlan();
  // The strip opens at the first fact: once it is laid out, and again whenever that changes, until the reader moves.
  const opening = new ResizeObserver(() => strip?.show(facts[0][0]));
  if (strip && facts.length) opening.observe(strip.el);
  for (const event of ["pointerdown", "wheel", "keydown"]) {
    root.addEventListener(event, () => opening.disconnect(), { once: true, passive: true });
  }
  return () => {
    opening.disconnect();
    drop.forEach((off) => off());
    race.stop();
    status.stop();
    sync.cancel();
  };
}

/** How to read the strip, and the facts by number. */
function stripKey(facts, window_) {
  const sample = (kind, text) => h("span.key-item", {}, h(`span.token.${kind}`, {}, "word"), ` ${text}`);
  return h(
    "div.key",
    {},
    sample("kept", "kept"),
    sample("evicted", "evicted"),
    ...(window_ ? [sample("recent", "recent window")] : []),
    ...(facts.length ? [h("span.key-item", {}, h("span.fact", {}, "word"), " hidden fact")] : []),
  );
}

export default { render };
