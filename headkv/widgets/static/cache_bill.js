// CacheBill: what a KV cache costs. Bytes a token by hand, the bill as the context grows, against the weights.

import { bytesText, choice, count, freshId, h, live, percent, picker, slider, times, widgetRoot } from "./toolkit.js";
import { billBar } from "./bill.js";
import { costCurves } from "./cost_curves.js";

const NAMES = [["layers", "Layers"], ["kv_heads", "KV heads"], ["head_dim", "Head dim"]];
const FOLLOWED = ["dtype", "context", "share", "weight_bytes", "batch", "card_bytes"];
const BYTES = { float32: 4, bfloat16: 2, float16: 2, int8: 1, int4: 0.5 };

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const presets = get("presets");
  const put = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const sizes = () => Object.fromEntries(NAMES.map(([name]) => [name, get(name)]));
  const known = (of) => presets.findIndex((p) => NAMES.every(([name]) => p[name] === of[name]));
  const weightsOf = (of) => presets[known(of)]?.weight_bytes ?? 0; // other sizes: another model, of unknown weight
  const asLog = (x) => Math.round(Math.log2(x) * 16) / 16;
  const fields = NAMES.map(([name, label]) => {
    const id = freshId(name);
    const input = h("input.number", {
      id,
      type: "number",
      min: 1,
      max: 100000,
      step: 1,
      "data-control": name,
      onchange: () => {
        const value = Math.round(Number(input.value));
        if (value >= 1) put({ [name]: value, weight_bytes: weightsOf({ ...sizes(), [name]: value }) });
        else draw(); // not a size: back to the last one
      },
    });
    return { name, input, el: h("div.control", {}, h("label", { for: id }, label), input) };
  });
  const preset = picker({
    label: "Model",
    name: "preset",
    value: "",
    options: [["", "your own"], ...presets.map((p, i) => [String(i), p.name])],
    onchange: (i) => (i === "" ? draw() : put(withoutName(presets[i]))),
  });
  const dtype = choice({
    label: "Stored as",
    name: "dtype",
    value: get("dtype"),
    options: Object.entries(BYTES).map(([key, size]) => [key, key, `${sized(size)} a number`]),
    onchange: (x) => put({ dtype: x }),
  });
  const context = slider({
    label: "Context",
    name: "context",
    min: 7,
    max: 20,
    step: 1 / 16,
    value: asLog(get("context")),
    format: () => `${count(get("context"))} tokens`,
    oninput: (x) => put({ context: Math.round(2 ** x) }),
  });
  const share = slider({
    label: "Share kept",
    name: "share",
    min: 0.01,
    max: 1,
    step: 0.01,
    value: get("share"),
    format: (x) => percent(x),
    oninput: (x) => put({ share: x }),
  });
  const batch = slider({
    label: "Texts at once",
    name: "batch",
    min: 0,
    max: 8,
    step: 1,
    value: Math.log2(get("batch")),
    format: () => times(get("batch"), "text"),
    oninput: (x) => put({ batch: 2 ** x }),
  });
  const card = picker({
    label: "Card",
    name: "card",
    value: get("card_bytes"),
    options: [[0, "none"], ...get("cards").map((bytes) => [bytes, bytesText(bytes)])],
    onchange: (x) => put({ card_bytes: Number(x) }),
  });
  const curves = costCurves();
  const formula = h("p.formula");
  const bill = billBar({});
  const weightBar = h("div.weight-fill");
  const weightText = h("p.bill-note");
  const weightFrame = h("div.weight-bar", {}, weightBar);
  const scaled = h("div.scaled", {}, bill.el, h("div.weights", {}, weightText, weightFrame));
  const story = h("p.story");
  const root = widgetRoot(
    "cache-bill",
    get("title"),
    "What a KV cache costs",
    h("div.bill-top", {}, preset.el, card.el),
    h("div.controls.sizes", {}, ...fields.map((f) => f.el), dtype.el),
    h("div.controls.two", {}, context.el, share.el, batch.el),
    formula,
    scaled,
    curves.el,
    story,
  );
  el.append(root);

  function draw() {
    const [layers, heads, dim] = NAMES.map(([name]) => get(name));
    const size = BYTES[get("dtype")];
    const token = 2 * layers * heads * dim * size;
    const texts = get("batch");
    const full = token * get("context") * texts;
    const kept = full * get("share");
    const weights = get("weight_bytes");
    fields.forEach(({ name, input }) => (input.value = get(name)));
    dtype.set(get("dtype"));
    context.set(asLog(get("context")));
    share.set(get("share"));
    batch.set(Math.log2(texts));
    card.set(get("card_bytes"));
    const match = known(sizes());
    preset.set(match < 0 ? "" : String(match));

    formula.replaceChildren(
      ...termParts(["2", "key and value"], [layers, "layers"], [heads, "KV heads"], [dim, "numbers"], [
        size,
        size === 1 ? "byte" : "bytes",
      ]),
      h("span.term", {}, h("b", {}, `= ${count(token)}`), h("small", {}, "bytes a token")),
    );
    const widest = Math.max(full, weights);
    const words = `${bytesText(kept)} of ${bytesText(full)} for ${count(get("context"))} tokens` +
      (texts > 1 ? ` in each of ${count(texts)} texts` : "");
    bill.bar.style.width = `${Math.max(0.4, (100 * full) / widest)}%`;
    bill.update({ kept, full, share: get("share"), words });
    weightFrame.hidden = !weights;
    weightText.textContent = weights ? `Weights: ${bytesText(weights)}, drawn to the same scale` : "";
    weightBar.style.width = `${(100 * weights) / widest}%`;
    const meet = weights / token / get("share") / texts;
    const kind = get("share") < 1 ? `a cache kept to ${percent(get("share"))}` : "the cache";
    const compared = !weights ? "" : ` Here it is ${(kept / weights).toPrecision(2)} times the weights; ${kind} ` +
      `weighs as much as they do at about ${count(Number(meet.toPrecision(4)))} tokens${texts > 1 ? " a text" : ""}.`;
    const made = texts > 1 ? `${count(texts)} tokens` : "one token";
    const fits = Math.floor(Math.max(0, get("card_bytes") - weights) / (token * get("share")));
    const fitting = !get("card_bytes")
      ? ""
      : fits
      ? ` Beside the weights a card of ${bytesText(get("card_bytes"))} holds ${count(fits)} tokens of it: ` +
        `${times(Math.floor(fits / get("context")), "text")} of this length.`
      : ` A card of ${bytesText(get("card_bytes"))} does not even hold the weights.`;
    story.textContent = `Each decode step reads all ${bytesText(kept)} of it to make ${made}.${compared}${fitting}`;
    curves.update({
      perToken: token * texts,
      share: get("share"),
      weights,
      card: get("card_bytes"),
      context: get("context"),
      words: `Bytes over tokens: ${words}.${compared}${fitting}`,
    });
    Object.assign(root.dataset, { bytesPerToken: token, fullBytes: full, keptBytes: Math.round(kept), fits });
    return `${count(token)} bytes a token. ${words}. ${story.textContent}`;
  }

  return live(root, model, [...FOLLOWED, ...NAMES.map(([name]) => name)], draw);
}

const sized = (bytes) => bytes < 1 ? "half a byte" : times(bytes, "byte");
const withoutName = ({ name: _, ...sizes }) => sizes;

/** 2 x layers x heads x ..., each number with its word under it. */
function termParts(...terms) {
  return terms.map(([number, word], i) =>
    h(
      "span.term",
      {},
      h("b", {}, (i ? "× " : "") + (number < 1 ? number : count(Number(number)))),
      h("small", {}, word),
    )
  );
}

export default { render };
