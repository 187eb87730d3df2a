// Bytes over context, both axes logarithmic: the cache rises, the weights and a card's memory do not.

import { h, s } from "./toolkit.js";

const [FROM, TO] = [7, 20]; // tokens, as powers of two
const [LOW, HIGH] = [6, 13]; // bytes, as powers of ten
const TOKENS = { 10: "1k", 14: "16k", 17: "128k", 20: "1M tokens" };
const UNITS = { 6: "1 MB", 9: "1 GB", 12: "1 TB" };
const x = (tokens) => (100 * (Math.log2(tokens) - FROM)) / (TO - FROM);
const y = (bytes) => 100 - (100 * (Math.log10(bytes) - LOW)) / (HIGH - LOW);

/** `update({perToken, share, weights, card, context})`: bytes a token of the full cache of all texts, and the rest. */
export function costCurves() {
  const line = (kind) => s(`line.curve.curve-${kind}`, { x1: 0, x2: 100 });
  const [full, kept, weights, card] = ["full", "kept", "weights", "card"].map(line);
  const decades = Array.from({ length: HIGH - LOW - 1 }, (_, i) => {
    const at = y(10 ** (LOW + 1 + i));
    return s("line.curve-decade", { x1: 0, x2: 100, y1: at, y2: at });
  });
  const svg = s(
    "svg.curve-plot",
    { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" },
    ...decades,
    weights,
    card,
    full,
    kept,
  );
  const here = h("span.curve-here", { "aria-hidden": "true" });
  const bytes = Object.entries(UNITS).map(([power, text]) => {
    const label = h("span.curve-bytes", {}, text);
    label.style.top = `${y(10 ** Number(power))}%`;
    return label;
  });
  const tokens = Object.entries(TOKENS).map(([power, text]) => {
    const label = h("span.curve-tokens", {}, text);
    label.style.left = `${x(2 ** Number(power))}%`;
    return label;
  });
  const item = (kind, text) => h(`span.key-item.key-curve-${kind}`, {}, text);
  const keys = {
    full: item("full", "full cache"),
    kept: item("kept", "share kept"),
    weights: item("weights", "weights"),
    card: item("card", "the card's memory"),
  };
  const flat = (node, key, value) => {
    node.style.display = value ? "" : "none";
    key.hidden = !value;
    if (!value) return;
    node.setAttribute("y1", String(y(value)));
    node.setAttribute("y2", String(y(value)));
  };
  const rising = (node, perToken) => {
    node.setAttribute("y1", String(y(perToken * 2 ** FROM)));
    node.setAttribute("y2", String(y(perToken * 2 ** TO)));
  };
  return {
    el: h(
      "div.curves",
      {},
      h("div.curve-frame", {}, svg, here, ...bytes, ...tokens),
      h(
        "div.key",
        {},
        ...Object.values(keys),
        h("span", {}, "Bytes over tokens of context; both scales are logarithmic."),
      ),
    ),
    update(now) {
      rising(full, now.perToken);
      rising(kept, now.perToken * now.share);
      keys.kept.hidden = now.share === 1;
      kept.style.display = now.share === 1 ? "none" : "";
      flat(weights, keys.weights, now.weights);
      flat(card, keys.card, now.card);
      here.style.left = `${Math.min(100, Math.max(0, x(now.context)))}%`;
      here.style.top = `${Math.min(100, Math.max(0, y(now.perToken * now.share * now.context)))}%`;
      svg.setAttribute("aria-label", now.words);
    },
  };
}
