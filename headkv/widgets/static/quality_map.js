// QualityMap: answers against bytes, a line a method; the point that is chosen says what it is the mean of.

import { bytesText, choice, count, h, live, percent, picker, times, widgetRoot } from "./toolkit.js";
import { figureTable, foldedTable, linePlot } from "./lines.js";

/** @import { Model } from "./toolkit.js" */

const [MODEL, QUESTION, TASK, LENGTH, METHOD, BUDGET] = [0, 1, 2, 3, 4, 5];
const PLACES = ["model", "question", "task", "length", "method", "budget"];
const ALL = "all tasks";
const SHARES = [0.05, 0.1, 0.2, 0.5, 1];

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const [models, questions, lengths, methods, budgets] = ["models", "questions", "lengths", "methods", "budgets"].map(
    get,
  );
  const tasks = [...get("tasks"), ALL];
  const cells = get("cells").map((cell) => {
    const [bytes, full, entries, score, low, high, logp, divergence, documents] = cell.slice(6);
    return { at: cell, bytes, full, entries, score, low, high, logp, divergence, documents };
  });
  const byPlace = new Map(cells.map((cell) => [cell.at.slice(0, 6).join(), cell]));
  const view = () => PLACES.map(get);
  const find = (changes) => byPlace.get(view().map((at, i) => changes[i] ?? at).join());
  const there = (i, at) => cells.some((cell) => cell.at[i] === at);

  /** What was picked, and of the other choices as many as were measured with it. */
  function pick(i, at) {
    const now = view();
    const alike = (cell) => cell.at.slice(0, METHOD).filter((x, j) => x === now[j]).length;
    const open = cells.filter((cell) => cell.at[i] === at);
    const best = open.reduce((one, other) => (alike(other) > alike(one) ? other : one));
    for (let j = 0; j < METHOD; j++) model.set(PLACES[j], best.at[j]);
    model.save_changes();
  }

  const select = (label, i, options) =>
    picker({ label, name: PLACES[i], options, value: view()[i], onchange: (at) => pick(i, Number(at)) });
  const ways = choice({
    label: "The question is",
    name: "question",
    options: questions.map((name, i) => [String(i), { second: "a second one" }[name] ?? name]),
    value: String(get("question")),
    onchange: (at) => pick(QUESTION, Number(at)),
  });
  const pickers = {
    model: select("Model", MODEL, models.map((name, i) => [i, name])),
    task: select("Task", TASK, tasks.map((name, i) => [i, name]).filter(([i]) => there(TASK, i))),
    length: select("Tokens", LENGTH, lengths.map((n, i) => [i, count(n)])),
  };
  const open = Object.values(pickers).filter((one) => one.el.querySelectorAll("option").length > 1);
  const plot = linePlot({
    label: "Answers against bytes",
    onpick: (line, point) => {
      const shown = linesNow()[line];
      if (!shown) return;
      model.set("budget", shown.cells[point].at[BUDGET]);
      model.set("method", shown.method);
      model.save_changes();
    },
  });
  const headline = h("p.map-says");
  const figures = h("p.map-figures");
  const behind = h("div.map-behind");
  const folded = foldedTable("All figures of this picture");
  const root = widgetRoot(
    "quality-map",
    get("title"),
    "Answers against bytes",
    h("div.dial-pickers", {}, ways.el, ...open.map((one) => one.el)),
    plot.el,
    h("div.map-point", {}, headline, figures, behind),
    folded.el,
  );
  el.append(root);

  /** The lines of what is shown: methods that were measured there, without the full cache. */
  function linesNow() {
    return methods.map((name, method) => ({
      name,
      method,
      cells: budgets.map((_, budget) => find({ [METHOD]: method, [BUDGET]: budget })).filter((cell) => cell),
    })).slice(1).filter((line) => line.cells.length);
  }
  const fullNow = () => budgets.map((_, budget) => find({ [METHOD]: 0, [BUDGET]: budget })).find((cell) => cell);
  const score = (x) => x.toFixed(2);
  const kept = (cell) => {
    const budget = budgets[cell.at[BUDGET]];
    return budget <= 1 ? percent(budget) : `${count(budget)} a head`;
  };
  const spread = (cell) => `${score(cell.low)} to ${score(cell.high)}`;
  const words = (cell) =>
    `${methods[cell.at[METHOD]]}, ${kept(cell)} kept: ${score(cell.score)} found (${spread(cell)}) with ` +
    `${bytesText(cell.bytes)} of ${bytesText(cell.full)}`;

  function draw() {
    const lines = linesNow();
    const full = fullNow();
    const [m, q, task, length, method, budget] = view();
    ways.set(String(q));
    pickers.model.set(m);
    pickers.task.set(task);
    pickers.length.set(length);
    root.dataset.state = JSON.stringify({ lines: lines.map((line) => [line.name, line.cells.map((c) => c.score)]) });
    plot.el.hidden = !lines.length;
    if (!lines.length) {
      headline.textContent = "Nothing was measured here.";
      figures.textContent = "";
      behind.replaceChildren();
      folded.update([], []);
      return headline.textContent;
    }
    const line = Math.max(0, lines.findIndex((one) => one.method === method));
    const nearest = (one) => {
      const far = one.cells.map((cell) => Math.abs(cell.at[BUDGET] - budget));
      return far.indexOf(Math.min(...far));
    };
    const point = nearest(lines[line]);
    const chosen = lines[line].cells[point];
    const log = (cell) => Math.log2(cell.bytes / cell.full);
    const least = Math.min(...lines.flatMap((one) => one.cells.map(log)));
    const ticks = SHARES.filter((share) => Math.log2(share) >= least - 0.3);
    plot.update({
      lines: lines.map((one) => ({
        name: one.name,
        dotted: get("uniform").includes(one.name),
        points: one.cells.map((cell) => ({
          x: log(cell),
          y: cell.score,
          low: cell.low,
          high: cell.high,
          words: words(cell),
        })),
      })),
      chosen: [line, point],
      x: {
        title: `bytes, as a share of the full cache's ${
          bytesText(chosen.full)
        }; each step to the right is the same factor`,
        min: least - 0.15,
        max: 0,
        ticks: ticks.map((share) => /** @type {[number, string]} */ ([Math.log2(share), percent(share)])),
      },
      y: { title: "share of the answers found", min: 0, max: 1, ticks: [[0, "0"], [0.5, ".5"], [1, "1"]] },
      ...(full ? { level: full.score, levelText: `full cache ${score(full.score)}` } : {}),
    }, [m, q, task, length].join());
    headline.textContent = `${words(chosen)}.`;
    figures.textContent = [
      `${percent(chosen.bytes / chosen.full, 1)} of the bytes, ${percent(chosen.entries, 1)} of the entries`,
      likelihood(chosen, full),
      `95% intervals, ${times(chosen.documents, "question")}`,
    ].filter(Boolean).join("; ") + ".";
    behind.replaceChildren(
      ...groupsBehind(chosen).map(([label, rows]) => {
        const table = figureTable(label);
        table.update([label, "found", "95%", "MB", "n"], rows);
        return table.el;
      }),
    );
    folded.update(
      ["found", ...budgets.map((b) => (b <= 1 ? percent(b) : count(b)))],
      methods.map((name, k) => [
        name,
        ...budgets.map((_, b) => {
          const cell = find({ [METHOD]: k, [BUDGET]: b });
          return cell ? `${score(cell.score)} (${(cell.bytes / 1e6).toFixed(1)} MB)` : "";
        }),
      ]).filter((row) => row.slice(1).some(Boolean)),
    );
    return headline.textContent;
  }

  /** The same method and budget, in each task, way to ask, length and model: [label, rows]. */
  function groupsBehind(chosen) {
    const own = { [METHOD]: chosen.at[METHOD], [BUDGET]: chosen.at[BUDGET] };
    const group = (label, names, i) => {
      const rows = names.map((name, at) => {
        const cell = find({ ...own, [i]: at });
        if (!cell) return null;
        return [name, score(cell.score), spread(cell), (cell.bytes / 1e6).toFixed(2), count(cell.documents)];
      }).filter((row) => row !== null);
      return /** @type {[string, string[][]]} */ ([label, rows]);
    };
    return [
      group("task", tasks, TASK),
      group("question", questions, QUESTION),
      group("tokens", lengths.map(count), LENGTH),
      group("model", models, MODEL),
    ].filter(([, rows]) => rows.length > 1);
  }

  return live(root, model, PLACES, draw);
}

/** What the right answer was worth to the model, where that was measured. */
function likelihood(cell, full) {
  if (cell.logp === null || cell.divergence === null) return "";
  const beside = full ? ` (full cache ${full.logp.toFixed(2)})` : "";
  return `log-probability of the right answer ${cell.logp.toFixed(2)} a token${beside}, ` +
    `distance from the full cache ${cell.divergence.toFixed(2)} nats`;
}

export default { render };
