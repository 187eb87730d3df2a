// The strip: the document as running text. Kept entries are solid, evicted ones pale with a hollow mark,
// the recent window is edged, the hidden facts are underlined. Above it, every head of the layer at a glance.

import { h, s } from "./toolkit.js";

/** Facts arrive as [start, end, label]; returns for each of n entries the number of its fact, or -1. */
function factOfEntry(facts, n) {
  const of = new Int16Array(n).fill(-1);
  facts.forEach(([start, end], f) => of.fill(f, start, end));
  return of;
}

/** Running text of n entries; `update(mask, recent)` redraws only what changed. */
export function textStrip({ n, tokens, facts }) {
  const factOf = factOfEntry(facts, n);
  const root = h("div.strip", {
    tabindex: 0,
    role: "region",
    "aria-label": "The document, entry by entry",
  });
  const spans = [];
  /** @type {HTMLElement} */
  let parent = root;
  for (let i = 0; i < n; i++) {
    const text = tokens ? tokens[i] : "";
    const word = text.replace(/^ +/, "");
    const space = text.slice(0, text.length - word.length);
    if (factOf[i] >= 0 && (i === 0 || factOf[i] !== factOf[i - 1])) {
      parent = h("span.fact", { "data-fact": factOf[i] });
      root.append(space, parent); // the blank before a fact is not underlined
    } else {
      if (factOf[i] < 0) parent = root;
      parent.append(space);
    }
    const span = h(tokens ? "span.token" : "span.token.bare", { "data-entry": i });
    span.textContent = word.trim() === "" && tokens ? word.replace(/\n/g, "↵\n") || "·" : word;
    spans.push(span);
    parent.append(span);
  }
  let shown = null;
  let edge = -1;
  return {
    el: h(`div.strip-frame${n < 60 ? ".short" : ""}`, {}, root),
    update(mask, recent) {
      for (let i = 0; i < n; i++) {
        if (!shown || shown[i] !== mask[i]) spans[i].classList.toggle("hk-evicted", !mask[i]);
      }
      shown = mask;
      if (edge !== recent) {
        spans.forEach((span, i) => {
          span.classList.toggle("hk-recent", i >= n - recent);
          span.classList.toggle("hk-recent-first", i === n - recent);
        });
        edge = recent;
      }
    },
    /** Colour by weights: the square root, as part of the greatest. @param {Float32Array} weights */
    shade(weights) {
      const most = weights.reduce((a, b) => Math.max(a, b), 1e-12);
      root.classList.add("hk-shaded");
      spans.forEach((span, i) =>
        span.style.setProperty("--hk-look", `${(100 * Math.sqrt(weights[i] / most)).toFixed(0)}%`)
      );
    },
    /** Scroll entry i into the upper third. */
    show: (
      i,
    ) => (root.scrollTop += spans[i].getBoundingClientRect().top - root.getBoundingClientRect().top -
      root.clientHeight / 3),
    reveal(i) {
      const target = spans[Math.max(0, Math.min(n - 1, i))];
      this.show(spans.indexOf(target));
      spans.forEach((span) => span.classList.remove("hk-found"));
      target.classList.add("hk-found");
    },
    entryOf: (target) => {
      const span = target.closest?.("[data-entry]");
      return span && root.contains(span) ? Number(span.dataset.entry) : null;
    },
  };
}

/** Runs of ones in a mask as an SVG path of boxes, one unit an entry wide. */
function maskPath(mask) {
  let path = "";
  for (let i = 0; i < mask.length; i++) {
    if (!mask[i]) continue;
    let j = i;
    while (j < mask.length && mask[j]) j++;
    path += `M${i} 0h${j - i}v1h${i - j}z`;
    i = j;
  }
  return path;
}

/** The whole document on one line for each of some masks (heads, or methods): a bar where an entry is kept, ticks where the facts are. */
export function overview({ n, heads, nameOf, facts, onselect, onlocate }) {
  const rows = Array.from({ length: heads }, (_, head) => {
    const path = s("path.kept-runs");
    const svg = s("svg.track", { viewBox: `0 0 ${n} 1`, preserveAspectRatio: "none", "aria-hidden": "true" }, path);
    const tally = h("span.track-count");
    const name = h(
      "button.track-name",
      { type: "button", onclick: () => onselect(head) },
      nameOf(head),
    );
    const row = h("div.track-row", { "data-track": head }, name, svg, tally);
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      onselect(head);
      onlocate(Math.floor(((event.clientX - box.left) / box.width) * n));
    });
    return { row, path, tally, name, svg };
  });
  const ticks = h("div.ticks");
  facts.forEach(([start, end, label], f) => {
    const tick = h("button.tick", {
      type: "button",
      onclick: () => onlocate(start),
      "aria-label": `Show fact ${f + 1}${label ? `: ${label}` : ""}`,
    }, String(f + 1));
    tick.style.left = `${(100 * (start + end)) / 2 / n}%`;
    ticks.append(tick);
  });
  const tickRow = h(
    "div.track-row.tick-row",
    {},
    h("span.track-legend", {}, facts.length ? "facts" : ""),
    ticks,
    h("span"),
  );
  return {
    el: h("div.overview", {}, ...(facts.length ? [tickRow] : []), ...rows.map((r) => r.row)),
    update(masks, lengths, chosen) {
      rows.forEach(({ row, path, tally, name }, head) => {
        path.setAttribute("d", maskPath(masks[head]));
        tally.textContent = lengths[head];
        row.classList.toggle("hk-chosen", head === chosen);
        name.setAttribute("aria-pressed", String(head === chosen));
      });
    },
    positionOf(target, event) {
      const svg = target.closest?.("svg.hk-track");
      if (!svg) return null;
      const box = svg.getBoundingClientRect();
      const at = Math.floor(((event.clientX - box.left) / box.width) * n);
      return { head: rows.findIndex((r) => r.svg === svg), position: Math.max(0, Math.min(n - 1, at)) };
    },
  };
}
