// Slots go one by one: each head's pooled scores, best first. Ada-KV gives the next slot to the highest
// remaining score of any head, so a level sinks over all heads; uniform budgets cut every head at the same rank.

import { count, freshId, h, player, s, slider, times } from "./toolkit.js";

/** `update(ranked, {slots, budgets, allocator})` starts over; the player moves a layer's slots. */
export function slotRace({ heads, headNames, m }) {
  const panels = Array.from({ length: heads }, (_, head) => racePanel(headNames?.[head] ?? head, m));
  const story = h("p.race-story");
  let state = null;
  let given = 0;

  const total = () => heads * state.slots;
  const ownerOf = (i) => (state.allocator === "uniform" ? i % heads : Math.floor(state.ranked.order[i] / m));
  const scoreOf = (i) => {
    if (state.allocator !== "uniform") return state.ranked.pooled[state.ranked.order[i]];
    const head = i % heads;
    return state.ranked.pooled[head * m + state.ranked.heads[head].best[Math.floor(i / heads)]];
  };
  const counts = () => {
    const out = new Array(heads).fill(0);
    for (let i = 0; i < given; i++) out[ownerOf(i)]++;
    return out;
  };
  const draw = () => {
    const now = counts();
    const level = given && state.allocator !== "uniform" ? scoreOf(given - 1) : null;
    const last = given ? ownerOf(given - 1) : -1;
    panels.forEach((panel, head) => panel.update(now[head], level, state.budgets[head], head === last));
    scrub.limit(total());
    scrub.set(given);
    const names = (list) => list.map((x, head) => `${count(x)} to head ${headNames?.[head] ?? head}`).join(", ");
    if (!total()) story.textContent = "The budget is no larger than the recent window: there is no slot to give.";
    else if (given === total()) {
      const moved = state.budgets.some((b, head) => b !== now[head]);
      story.textContent = `All ${count(total())} slots are given: ${names(now)}.` +
        (moved ? ` With the safeguard, and equal scores shared, ${names(state.budgets)} (▼).` : "");
    } else {
      const next = ownerOf(given);
      story.textContent = `${count(given)} of ${count(total())} slots given. The next one goes to head ` +
        `${headNames?.[next] ?? next}` + (state.allocator === "uniform"
          ? ", as it is its turn."
          : `, which has the highest remaining score of any head (${(scoreOf(given) * state.unit).toExponential(1)}).`);
    }
  };
  const moveTo = (x) => {
    given = Math.max(0, Math.min(total(), x));
    draw();
    return given < total();
  };
  const scrub = slider({
    label: "Slots given",
    min: 0,
    max: 1,
    step: 1,
    value: 0,
    format: count,
    name: "slots",
    oninput: (x) => (controls.pause(), moveTo(x)),
  });
  const controls = player({
    noun: "give one slot",
    advance: (steps) => moveTo(given + steps),
    reset: () => moveTo(0),
    rate: () => Math.max(1, Math.round(total() / 160)),
  });
  const legend = h(
    "p.key",
    {},
    h("span", {}, "Scores, best first, logarithmic height:"),
    h("span.key-item.key-taken", {}, "slot given"),
    h("span.key-item.key-level", {}, "sinking level"),
    h("span.key-item.key-even", {}, "uniform budget"),
    h("span.key-item.key-safe", {}, "budget after the safeguard"),
  );
  return {
    el: h(
      "div.race",
      {},
      h("div.race-controls", {}, controls.el, scrub.el),
      story,
      h("div.race-panels", {}, ...panels.map((p) => p.el)),
      legend,
    ),
    stop: controls.pause,
    update(ranked, setting) {
      const fresh = !state || state.ranked !== ranked || state.allocator !== setting.allocator;
      const finished = state && given === heads * state.slots;
      state = { ranked, ...setting };
      panels.forEach((panel, head) => panel.scale(ranked, head, state.slots, state.budgets));
      if (fresh) controls.pause();
      given = fresh || finished ? total() : Math.min(given, total());
      draw();
    },
  };
}

/** One head: an area of its scores, best first, on a logarithmic scale shared by the layer. */
function racePanel(name, m) {
  const clip = freshId("clip");
  const taken = s("rect", { x: 0, y: 0, width: 0, height: 100 });
  const area = s("path.race-area");
  const filled = s("path.race-filled", { "clip-path": `url(#${clip})` });
  const level = s("line.race-level", { x1: 0, x2: m });
  const even = s("line.race-even", { y1: 0, y2: 100 });
  let reach = m;
  const svg = s(
    "svg.race-plot",
    { viewBox: `0 0 ${m} 100`, preserveAspectRatio: "none", role: "img" },
    s("clipPath", { id: clip }, taken),
    area,
    filled,
    even,
    level,
  );
  const safe = h("span.race-safe", { "aria-hidden": "true" }, "▼");
  const title = h("span.race-title");
  let top = 1;
  let bottom = 1;
  const y = (score) => 100 - 96 * Math.max(0, Math.log(Math.max(score, bottom) / bottom) / Math.log(top / bottom));
  return {
    el: h("div.race-panel", {}, title, h("div.race-frame", {}, safe, svg)),
    scale(ranked, head, slots, budgets) {
      reach = Math.min(m, Math.max(8, 2 * Math.max(slots, ...budgets))); // the race is run at the left end
      svg.setAttribute("viewBox", `0 0 ${reach} 100`);
      top = ranked.pooled[ranked.order[0]] || 1;
      bottom = top * 1e-4;
      let path = "M0 100"; // a step an entry
      ranked.heads[head].best.forEach((position, i) => {
        path += `V${y(ranked.pooled[head * m + position]).toFixed(1)}H${i + 1}`;
      });
      area.setAttribute("d", `${path}V100z`);
      filled.setAttribute("d", `${path}V100z`);
      even.setAttribute("x1", slots);
      even.setAttribute("x2", slots);
    },
    update(given, score, budget, isLast) {
      taken.setAttribute("width", given);
      level.style.display = score === null ? "none" : "";
      if (score !== null) {
        level.setAttribute("y1", String(y(score)));
        level.setAttribute("y2", String(y(score)));
      }
      safe.style.left = `${(100 * budget) / reach}%`;
      title.textContent = `head ${name}: ${times(given, "slot")}`;
      title.classList.toggle("hk-last", isLast);
      svg.setAttribute("aria-label", `Head ${name} has ${count(given)} slots, ${count(budget)} after the safeguard`);
    },
  };
}
