// EvictionTimeline: what became of each entry of a small cache, moment by moment, as Python recorded it.

import { h, live, player, slider, times, widgetRoot } from "./toolkit.js";

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const moments = get("moments");
  const names = get("names");
  const last = moments.length - 1;
  const total = moments[last].seen;
  const means = moments.some(({ rows }) => rows.some(({ mean }) => mean));
  const windowed = moments.some(({ rows }) => rows.some(({ window }) => window[1]));
  const go = (at) => {
    model.set("at", Math.max(0, Math.min(last, at)));
    model.save_changes();
  };

  const controls = player({
    noun: "the next moment",
    every: 1100,
    reset: () => go(0),
    back: () => go(get("at") - 1),
    advance: (n) => {
      go(get("at") + n);
      return get("at") < last;
    },
  });
  const moment = slider({
    label: "Moment",
    name: "at",
    min: 0,
    max: last,
    step: 1,
    value: get("at"),
    format: (x) => `${x + 1} of ${last + 1}: ${moments[x].name}, ${times(moments[x].seen, "token")}`,
    oninput: (x) => {
      controls.pause();
      go(x);
    },
  });

  const words = get("tokens").map((token) => h("span.token", {}, token));
  const rows = names.map((name, r) => timelineRow(name, moments.map((one) => one.rows[r]), total, means));
  const root = widgetRoot(
    "eviction-timeline",
    get("title"),
    "A cache, moment by moment",
    h("div.timeline-controls", {}, controls.el, moment.el),
    words.length ? h("p.timeline-text", {}, ...words) : null,
    h("div.timeline-rows", {}, ...rows.map((row) => row.el)),
    timelineKey(windowed, means),
  );
  el.append(root);

  function draw() {
    const at = get("at");
    const { seen } = moments[at];
    moment.set(at);
    words.forEach((word, i) => {
      word.classList.toggle("hk-later", i >= seen);
      word.classList.toggle("hk-now", at > 0 && i < seen && i >= moments[at - 1].seen);
    });
    rows.forEach((row) => row.draw(at, seen));
    root.dataset.state = JSON.stringify({ at, rows: rows.map((row) => row.shown()) });
    return `${moments[at].name}. ${rows.map((row) => row.words(at)).join(" ")}`;
  }
  return live(root, model, ["at"], draw, { stops: [controls.pause] });
}

/**
 * One row of the cache: a cell for each position of the text, and what the compensation entry stands for.
 * @param {string} name
 * @param {any[]} states
 * @param {number} total
 * @param {boolean} means some row of the picture compensates
 */
function timelineRow(name, states, total, means) {
  const cells = Array.from({ length: total }, () => h("span.moment"));
  const diamond = h("span.diamond");
  // The words of all moments lie on one another, so that the longest ones reserve the height.
  const said = states.map(({ says }) => h("span", {}, says));
  const stored = h("span.timeline-count");
  const picture = h("div.timeline-cells", { role: "img" }, ...(means ? [diamond] : []), ...cells);
  picture.style.setProperty("--hk-diamond", means ? "3.1em" : "");
  picture.style.setProperty("--hk-tokens", String(total));
  let kinds = [];
  return {
    el: h(
      "div.timeline-row",
      {},
      h("p.timeline-head", {}, h("b", {}, name), stored),
      h("p.timeline-says", {}, ...said),
      picture,
    ),
    shown: () => kinds,
    words: (at) => `${name}: ${states[at].says}.`,
    draw(at, seen) {
      const [now, before] = [states[at], states[at - 1]];
      kinds = cells.map((_, p) => kindOf(now, p, seen));
      cells.forEach((cell, p) => {
        const changed = before && kinds[p] !== kindOf(before, p, seen);
        cell.setAttribute("class", `hk-moment hk-moment-${kinds[p]}${changed ? " hk-changed" : ""}`);
        cell.textContent = { stored: p, hidden: p, taken: "◇", gone: "·", later: "" }[kinds[p]];
        cell.dataset.tip = `position ${p}: ${MEANS[kinds[p]]}`;
      });
      const inWindow = now.stored.slice(-now.window[1]).filter((p) => !now.hidden.includes(p));
      cells.forEach((cell, p) => cell.classList.toggle("hk-in-window", now.window[1] > 0 && inWindow.includes(p)));
      const stands = now.mean?.length ?? 0;
      diamond.textContent = stands ? `◆ ${stands}` : "";
      diamond.classList.toggle("hk-changed", stands !== (before?.mean?.length ?? 0));
      said.forEach((line, i) => line.classList.toggle("hk-now", i === at));
      stored.textContent = `${now.stored.length} of ${seen} stored`;
      const mean = stands ? `; one entry stands for ${stands}` : "";
      picture.setAttribute("aria-label", `${name}: stores positions ${now.stored.join(", ")} of ${seen}${mean}`);
    },
  };
}

const MEANS = {
  stored: "stored",
  hidden: "outside the window, dropped soon",
  taken: "gone, taken in by the compensation entry",
  gone: "gone",
  later: "not read yet",
};

/** What a position is to a row at one moment. */
function kindOf({ stored, hidden, mean }, position, seen) {
  if (position >= seen) return "later";
  if (hidden.includes(position)) return "hidden";
  if (stored.includes(position)) return "stored";
  return mean ? "taken" : "gone";
}

const timelineKey = (windowed, means) =>
  h(
    "div.key",
    {},
    h("span.key-item.key-entry", {}, "stored, by its position"),
    h("span.key-item.key-moment-new", {}, "new"),
    ...(windowed
      ? [
        h("span.key-item.key-window", {}, "in the window that slides"),
        h("span.key-item.key-outside", {}, "left the window, dropped soon"),
      ]
      : []),
    h("span.key-item.key-gone", {}, "gone (framed: just now)"),
    ...(means ? [h("span.key-item.key-diamond", {}, "the compensation entry, and for how many it stands")] : []),
  );

export default { render };
