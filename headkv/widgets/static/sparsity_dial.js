// SparsityDial: how many heads keep all, by which list; which they are, what it costs, and what the model still answers.

import { bytesText, choice, count, h, live, percent, picker, shareSelection, slider, widgetRoot } from "./toolkit.js";
import { headGrid } from "./grid.js";
import { billBar } from "./bill.js";
import { foldedTable, linePlot } from "./lines.js";

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const [layers, heads] = get("_shape");
  const names = get("names");
  const counts = get("counts");
  const lengths = get("lengths");
  const kinds = get("kinds");
  const scores = get("_scores").map((rows) => rows.flat());
  const total = layers * heads;
  const put = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const orders = scores.map((flat) => flat.map((_, i) => i).sort((a, b) => flat[b] - flat[a] || a - b));
  const ranks = orders.map((order) => order.reduce((rank, i, at) => ((rank[i] = at), rank), []));
  const said = (x) => (x !== 0 && Math.abs(x) < 0.005 ? x.toPrecision(2) : x.toFixed(2));

  // What was measured: of all kinds together, or of one.
  const sum = (values, kind) => (kind ? values[kinds.indexOf(kind)] : values.reduce((a, b) => a + b, 0));
  const right = (p, step) => sum(get("right")[get("length")][p][step], get("kind"));
  const full = () => sum(get("full")[get("length")], get("kind"));
  const asked = () => sum(get("asked")[get("length")], get("kind"));
  const bytes = (step) => stored(step) * fullBytes();
  const stored = (step) => get("stored")[get("length")][step];
  const fullBytes = () => total * lengths[get("length")] * get("bytes_per_entry");

  const dial = slider({
    label: "Heads that keep all",
    name: "at",
    min: 0,
    max: counts.length - 1,
    step: 1,
    value: get("at"),
    format: (step) => `${count(counts[step])} of ${count(total)}`,
    oninput: (step) => put("at", step),
  });
  const list = picker({
    label: "Heads ordered by",
    name: "profile",
    options: names.map((name, p) => [p, name]),
    value: get("profile"),
    onchange: (p) => put("profile", Number(p)),
  });
  const pickers = [list.el];
  const length = picker({
    label: "Tokens",
    name: "length",
    options: lengths.map((n, i) => [i, count(n)]),
    value: get("length"),
    onchange: (i) => put("length", Number(i)),
  });
  if (lengths.length > 1) pickers.push(length.el);
  const kind = choice({
    label: "Asked for",
    name: "kind",
    options: [["", "all"], ...kinds.map((name) => [name, name])],
    value: get("kind"),
    onchange: (name) => put("kind", name),
  });
  const bill = billBar({});
  const grid = headGrid({
    layers,
    heads,
    headNames: null,
    label: "Heads that keep all",
    onselect: (l, k) => put("selected", [l, k]),
    paint: (cell, l, k) => {
      const i = l * heads + k;
      const keeps = ranks[get("profile")][i] < counts[get("at")];
      cell.className = `hk-cell hk-kind hk-kind-${keeps ? 0 : 1}`;
      cell.textContent = heads > 12 ? "" : keeps ? "■" : "□";
      cell.setAttribute("aria-label", words(l, k));
    },
  });
  function words(l, k) {
    const [p, i] = [get("profile"), l * heads + k];
    return `layer ${l}, head ${k}: score ${said(scores[p][i])}, number ${ranks[p][i] + 1} of ${total}, ` +
      (ranks[p][i] < counts[get("at")] ? "keeps all" : "streams");
  }
  const verdict = h("p.dial-says");
  const edge = h("p.caption");
  const chosen = h("p.head-line");
  const plot = linePlot({
    label: "Answers against heads that keep all",
    onpick: (p, step) => {
      model.set("profile", p);
      put("at", step);
    },
  });
  const figures = foldedTable("All figures of this picture");
  const root = widgetRoot(
    "sparsity-dial",
    get("title"),
    "Heads that keep all, and answers",
    h("div.pinned", {}, dial.el, bill.el, verdict),
    h("div.dial-pickers", {}, ...pickers, ...(kinds.length > 1 ? [kind.el] : [])),
    h(
      "div.stage.stage-dial",
      {},
      h(
        "div.stage-grid",
        {},
        grid.el,
        h(
          "p.key",
          {},
          h("span", {}, h("span.cell.kind.kind-0.sample", {}, "■"), " keeps all"),
          h("span", {}, h("span.cell.kind.kind-1.sample", {}, "□"), " streams"),
        ),
      ),
      h("div", {}, edge, chosen, plot.el),
    ),
    figures.el,
  );
  el.append(root);

  function threshold(p, keep) {
    if (keep === 0) return "Every head streams.";
    if (keep === total) return "Every head keeps all.";
    const [last, next] = [scores[p][orders[p][keep - 1]], scores[p][orders[p][keep]]];
    if (last > next) return `These are the heads with a score of ${said(last)} or more; the next has ${said(next)}.`;
    const equal = scores[p].filter((x) => x === last).length;
    return `The last of them has ${said(last)}, as ${equal} heads have: among equals the earlier one is taken.`;
  }
  const answers = (p, step) => `${right(p, step)} of the full cache's ${full()} right answers`;

  function draw() {
    const [p, step] = [get("profile"), get("at")];
    const [l, k] = get("selected");
    dial.set(step);
    list.set(p);
    length.set(get("length"));
    kind.set(get("kind"));
    grid.paintAll();
    grid.select(l, k);
    bill.update({
      kept: bytes(step),
      full: fullBytes(),
      share: stored(step),
      words: `${bytesText(bytes(step))} of ${bytesText(fullBytes())}, ${percent(stored(step), 1)}`,
    });
    verdict.textContent = `${answers(p, step)}.`;
    edge.textContent = threshold(p, counts[step]);
    const here = words(l, k);
    chosen.textContent = here.charAt(0).toUpperCase() + here.slice(1);
    const lines = names.map((name, q) => ({
      name,
      points: counts.map((x, i) => ({
        x,
        y: full() ? right(q, i) / full() : 0,
        words: `${name}, ${x} heads, ${percent(stored(i))} of the cache: ${right(q, i)} of ${full()}`,
      })),
    }));
    plot.update({
      lines,
      chosen: [p, step],
      x: { title: "heads that keep all", min: 0, max: total, ticks: tickMarks(total) },
      y: {
        title: `answers right, of the ${full()} that the full cache has right (${asked()} were asked)`,
        min: 0,
        max: Math.max(1, ...lines.flatMap((line) => line.points.map((point) => point.y))),
        ticks: [[0, ""], [0.5, "½"], [1, "all"]],
      },
    }, `${get("length")} ${get("kind")}`);
    figures.update(
      ["heads", "stored", ...names],
      counts.map((x, i) => [String(x), percent(stored(i)), ...names.map((_, q) => `${right(q, i)} of ${full()}`)]),
    );
    root.dataset.state = JSON.stringify({
      keep: orders[p].slice(0, counts[step]).sort((a, b) => a - b),
      bytes: Math.round(bytes(step)),
      right: right(p, step),
      full: full(),
    });
    return `${names[p]}, ${counts[step]} heads keep all, ${percent(stored(step))} of the bytes: ${answers(p, step)}.`;
  }
  return live(root, model, ["at", "profile", "length", "kind", "selected"], draw, {
    stops: [shareSelection(model, layers, heads)],
  });
}

/** Some four steps of a round size. @param {number} most @returns {[number, string][]} */
function tickMarks(most) {
  const step = [1, 2, 5, 10, 20, 30, 50, 100, 200, 500].find((x) => most / x <= 4) ?? Math.ceil(most / 4);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => [i * step, String(i * step)]);
}

export default { render };
