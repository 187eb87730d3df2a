// HeadMap: the heads by any profile; where the chosen one looks in the text, and what each method keeps of that.

import { count, h, live, percent, picker, shareSelection, widgetRoot } from "./toolkit.js";
import { headGrid, paintLevel } from "./grid.js";
import { overview, textStrip } from "./strip.js";

/** @import { Model } from "./toolkit.js" */

const STEPS = 65535;
const MOST = 4; // tokens that are named

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const [layers, heads, n] = get("_shape");
  const names = get("names");
  const methods = get("methods");
  const tokens = get("tokens");
  const facts = get("facts");
  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const weights = get("_attention");
  const packed = get("_kept");
  const stride = Math.ceil(n / 8);
  const lookOf = (l, k) =>
    Float32Array.from({ length: n }, (_, i) => weights.getUint16(2 * ((l * heads + k) * n + i), true) / STEPS);
  const maskOf = (method, l, k) => {
    const from = ((method * layers + l) * heads + k) * stride;
    return Uint8Array.from({ length: n }, (_, i) => (packed.getUint8(from + (i >> 3)) >> (7 - (i & 7))) & 1);
  };
  const everything = new Uint8Array(n).fill(1);

  const profile = picker({
    label: "Heads by",
    name: "profile",
    options: names.map((name, p) => [p, name]),
    value: get("profile"),
    onchange: (p) => put("profile", Number(p)),
  });
  const shown = picker({
    label: "Text shows",
    name: "method",
    options: [[-1, "all entries"], ...methods.map((name, i) => [i, `what ${name} keeps`])],
    value: get("method"),
    onchange: (i) => put("method", Number(i)),
  });
  const ranges = get("_scores").map((rows) => {
    const flat = rows.flat();
    return { rows, low: Math.min(0, ...flat), high: Math.max(...flat, 1e-12) };
  });
  const grid = headGrid({
    layers,
    heads,
    headNames: null,
    label: "Score of each KV head",
    onselect: (l, k) => put("selected", [l, k]),
    paint: (cell, l, k) => {
      const { rows, low, high } = ranges[get("profile")];
      const score = rows[l][k];
      paintLevel(
        cell,
        (score - low) / (high - low),
        heads > 12 ? "" : score.toFixed(2),
        `layer ${l}, head ${k}: ${score.toFixed(3)}`,
      );
    },
  });
  const headline = h("p.chosen-line");
  const most = h("p.head-line");
  const tracks = overview({
    n,
    heads: methods.length,
    nameOf: (i) => methods[i],
    facts,
    onselect: (i) => put("method", get("method") === i ? -1 : i),
    onlocate: (i) => strip.reveal(i),
  });
  const strip = textStrip({ n, tokens, facts });
  const root = widgetRoot(
    "head-map",
    get("title"),
    "Heads, and where they look",
    h(
      "div.dial-pickers",
      {},
      ...(names.length > 1 ? [profile.el] : []),
      ...(methods.length ? [shown.el] : []),
    ),
    h(
      "div.stage",
      {},
      h("div.stage-grid", {}, h("p.caption", {}, names.length > 1 ? "score" : names[0]), grid.el),
      h(
        "div.stage-strip",
        {},
        headline,
        most,
        ...(methods.length
          ? [h("p.caption", {}, "What methods keep of this head: entries, and their share of its attention"), tracks.el]
          : []),
        strip.el,
        h(
          "p.key",
          {},
          h("span", {}, h("span.token.looked", { style: "--hk-look: 100%" }, "looked at"), " the deeper, the more"),
          ...(methods.length ? [h("span", {}, h("span.token.evicted", {}, "evicted"))] : []),
          ...(facts.length ? [h("span", {}, h("span.fact", {}, "hidden fact"))] : []),
        ),
      ),
    ),
  );
  el.append(root);

  let look = lookOf(...get("selected"));
  let shownHead = "";
  function draw() {
    const [l, k] = get("selected");
    const method = get("method");
    look = lookOf(l, k);
    const sum = look.reduce((a, b) => a + b, 0) || 1;
    profile.set(get("profile"));
    shown.set(method);
    grid.paintAll();
    grid.select(l, k);
    const masks = methods.map((_, i) => maskOf(i, l, k));
    const held = masks.map((mask) => look.reduce((a, x, i) => a + x * mask[i], 0) / sum);
    const lengths = masks.map((mask) => mask.reduce((a, b) => a + b, 0));
    tracks.update(masks, lengths.map((length, i) => `${count(length)} · ${percent(held[i])}`), method);
    strip.shade(look);
    strip.update(method < 0 ? everything : masks[method], 0);
    const order = Array.from(look.keys()).sort((a, b) => look[b] - look[a] || a - b).slice(0, MOST);
    headline.textContent = `Layer ${l}, head ${k}: where ${get("looking")} looks`;
    most.textContent = "Most: " + order.map((i) => `“${tokens[i].trim() || "↵"}” ${look[i].toFixed(2)}`).join(", ");
    if (shownHead !== `${l},${k}`) requestAnimationFrame(() => strip.show(order.find((i) => i > 0) ?? 0));
    shownHead = `${l},${k}`;
    root.dataset.state = JSON.stringify({ most: order, lengths, held: held.map((x) => Number(x.toFixed(4))) });
    return `${headline.textContent}. ${most.textContent}`;
  }
  const describe = (target, event) => {
    const track = tracks.positionOf(target, event);
    const entry = track ? track.position : strip.entryOf(target);
    return entry === null || entry === undefined
      ? null
      : `entry ${count(entry)} “${tokens[entry].trim()}”: weight ${look[entry].toFixed(3)}`;
  };
  return live(root, model, ["selected", "profile", "method"], draw, {
    describe,
    stops: [shareSelection(model, layers, heads)],
  });
}

export default { render };
