// Small shared parts: elements, numbers in words, controls, tooltips, a player. No framework, no network.

/** @typedef {{ get(name: string): any, set(name: string, value: any): void, save_changes(): void,
 *   on(event: string, handler: () => void): void, off(event: string, handler: () => void): void }} Model */
/** @typedef {string | Node | null} Child */

/**
 * An HTML element: h("div.name", {attributes, onclick}, children).
 * @template {string} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} attributes
 * @param {Child[]} children
 * @returns {Tag extends keyof HTMLElementTagNameMap ? HTMLElementTagNameMap[Tag]
 *   : Tag extends `${infer Name extends keyof HTMLElementTagNameMap}.${string}` ? HTMLElementTagNameMap[Name] : never}
 */
export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return furnish(document.createElement(name), classes, attributes, children);
}

/**
 * An SVG element, called in the same way.
 * @param {string} tag
 * @param {Record<string, any>} attributes
 * @param {Child[]} children
 * @returns {SVGElement}
 */
export function s(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", name), classes, attributes, children);
}

function furnish(node, classes, attributes, children) {
  if (classes.length) node.setAttribute("class", classes.map((c) => `hk-${c}`).join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/**
 * The root of a widget: a named region. Plain keys stay in it, as a notebook would take the arrows of a slider.
 * @param {string} kind
 * @param {string} title shown on top, unless it is empty
 * @param {string} label names the region that has no title
 * @param {Child[]} children
 */
export function widgetRoot(kind, title, label, ...children) {
  const onkeydown = (/** @type {KeyboardEvent} */ event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey && event.key !== "Escape") event.stopPropagation();
  };
  return h(
    "section",
    { class: `hk hk-${kind}`, "aria-label": title || label, "data-lm-suppress-shortcuts": "true", onkeydown },
    ...(title ? [h("p.title", {}, title)] : []),
    ...children,
  );
}

// A notebook loads this file once for each kind of widget: a random part keeps what they count apart.
const mine = Math.random().toString(36).slice(2, 8);
let idsGiven = 0;
/** @param {string} stem */
export const freshId = (stem) => `hk-${stem}-${mine}-${++idsGiven}`;

const wholeNumber = new Intl.NumberFormat("en-US"); // to make one takes longer than a hundred numbers
/** @param {number} x */
export const count = (x) => wholeNumber.format(Math.round(x));
/** @param {number} x @param {string} one */
export const times = (x, one, many = `${one}s`) => `${count(x)} ${x === 1 ? one : many}`;
/** @param {number} x */
export const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)}%`;

/** Decimal units, as bills are written: 46,080 B, 41.5 MB, 17.2 GB. @param {number} x */
export function bytesText(x) {
  if (x < 1e5) return `${count(x)} B`;
  const step = Math.min(4, Math.floor(Math.log10(x) / 3));
  const value = x / 1000 ** step;
  return `${value.toFixed(value < 100 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][step]}`;
}

/**
 * A labelled native slider; `format` says the value in words (read out, too).
 * @param {{ label: string, min: number, max: number, step: number, value: number, format: (x: number) => string,
 *   oninput: (x: number) => void, name: string }} options
 */
export function slider({ label, min, max, step, value, format, oninput, name }) {
  const id = freshId("slider");
  const output = h("output.value", { for: id });
  const input = h("input.range", { id, type: "range", min, max, step, "data-control": name });
  const show = (/** @type {number} */ x) => {
    const text = format(x);
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
    input.style.setProperty("--hk-at", `${(100 * (x - min)) / (Number(input.max) - min || 1)}%`);
  };
  const turn = () => {
    show(Number(input.value));
    oninput(Number(input.value));
  };
  input.addEventListener("input", turn);
  // A finger that scrolls the page from here has turned the slider before the page moves: it goes back.
  let held = input.value;
  input.addEventListener("pointerdown", () => (held = input.value));
  input.addEventListener("pointercancel", () => {
    input.value = held;
    turn();
  });
  const set = (/** @type {number} */ x) => {
    input.value = String(x);
    show(x);
  };
  set(value);
  const head = h("div.control-head", {}, h("label", { for: id }, label), output);
  const limit = (/** @type {number} */ top) => (input.max = String(top));
  return { el: h("div.control", {}, head, input), input, set, limit };
}

/**
 * One of a few: native radio buttons drawn as joined segments. `options` is [[value, label, hint]].
 * @param {{ label: string, options: string[][], value: string, onchange: (value: any) => void, name: string }} options
 */
export function choice({ label, options, value, onchange, name }) {
  const group = freshId("choice");
  const inputs = options.map(([key, , hint]) =>
    h("input", {
      type: "radio",
      name: group,
      value: key,
      id: `${group}-${key}`,
      "data-control": name,
      "aria-description": hint ?? null,
      onchange: () => onchange(key),
    })
  );
  const segments = options.map(([key, text, hint], i) =>
    h(
      "span.segment",
      { "data-tip": hint ?? null },
      inputs[i],
      h("label", { for: `${group}-${key}`, "data-text": text }, text),
    )
  );
  const set = (key) => inputs.forEach((input) => (input.checked = input.value === key));
  set(value);
  return {
    el: h("fieldset.control", {}, h("legend", {}, label), h("div.segments", {}, ...segments)),
    inputs,
    set,
  };
}

/**
 * A labelled native select over [value, label] pairs.
 * @param {{ label: string, options: [string | number, string][], value: string | number,
 *   onchange: (value: string) => void, name: string }} options
 */
export function picker({ label, options, value, onchange, name }) {
  const id = freshId("picker");
  const select = h(
    "select.select",
    { id, "data-control": name, onchange: () => onchange(select.value) },
    ...options.map(([key, text]) => h("option", { value: key }, text)),
  );
  const set = (/** @type {string | number} */ x) => (select.value = String(x));
  set(value);
  return { el: h("span.picker", {}, h("label", { for: id }, label), select), set };
}

/**
 * @param {string} text
 * @param {() => void} onclick
 */
export const button = (text, onclick, attributes = {}) =>
  h("button.button", { type: "button", onclick, ...attributes }, text);

/** What a thing of the picture says: its own words for a tooltip, or those that are read out. @param {any} target */
const toldBy = (target) => {
  const told = target.closest?.("[data-tip], .hk-cell, .hk-dot");
  return told?.dataset.tip ?? told?.getAttribute("aria-label");
};

/**
 * One tooltip for a whole widget: `describe(target)` gives the text of what the pointer is over, or null. A finger does
 * not hover: what it taps is described until it touches anything else.
 * @param {HTMLElement} root
 * @param {(target: any, event: PointerEvent) => string | null | undefined} describe
 */
export function tooltip(root, describe = () => null) {
  const tip = h("div.tip", { role: "presentation", hidden: true });
  root.append(tip);
  const hide = () => (tip.hidden = true);
  const show = (/** @type {PointerEvent} */ event) => {
    const text = describe(event.target, event) ?? toldBy(event.target);
    if (!text) return hide();
    tip.textContent = text;
    tip.hidden = false;
    const box = root.getBoundingClientRect();
    const left = Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4);
    const above = event.clientY - box.top - tip.offsetHeight - 12;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${above < 0 ? event.clientY - box.top + 22 : above}px`;
  };
  const touches = (/** @type {PointerEvent} */ event) => event.pointerType === "touch";
  root.addEventListener("pointermove", (event) => !touches(event) && show(event));
  root.addEventListener("pointerleave", (event) => !touches(event) && hide());
  root.addEventListener("pointerup", (event) => {
    if (!touches(event)) return;
    show(event);
    document.addEventListener("pointerdown", hide, { once: true });
  });
  root.addEventListener("keydown", hide);
}

/** A sentence for screen readers, said once things have settled. */
export function announcer() {
  const el = h("p.hidden", { role: "status", "aria-live": "polite" });
  let timer = 0;
  const say = (/** @type {string} */ text) => {
    clearTimeout(timer);
    timer = setTimeout(() => (el.textContent = text), 250);
  };
  return { el, say, stop: () => clearTimeout(timer) };
}

/**
 * Play, pause, one step, `back` if there is a way, back to the start. `advance(steps)` moves on and answers whether there
 * is more.
 * @param {{ advance: (steps: number) => boolean, reset: () => void, back?: () => void, rate?: () => number,
 *   every?: number, noun: string }} options
 */
export function player({ advance, reset, back, rate = () => 1, every = 60, noun }) {
  let timer = 0;
  const playing = () => timer !== 0;
  const show = () => {
    play.textContent = playing() ? "❚❚ Pause" : "▶ Play";
    play.setAttribute("aria-pressed", String(playing()));
  };
  const pause = () => {
    clearInterval(timer);
    timer = 0;
    show();
  };
  const tick = () => {
    if (!play.isConnected || !advance(rate())) pause();
  };
  const start = () => {
    timer ||= setInterval(tick, every);
    show();
  };
  const play = button("", () => {
    if (playing()) return pause();
    if (!advance(0)) reset(); // at the end: from the start again
    start();
  }, { "data-control": "play" });
  const step = button("Step", () => (pause(), advance(1)), { "data-control": "step", "aria-label": `Step: ${noun}` });
  const restart = button("↺ Restart", () => (pause(), reset()), { "data-control": "restart" });
  const undo = back ? button("Back", () => (pause(), back()), { "data-control": "back" }) : null;
  show();
  return { el: h("div.player", {}, play, undo, step, restart), start, pause };
}

/**
 * Keep a model's traits and a view in step: handlers are dropped when the view goes.
 * @param {Model} model
 * @param {string[]} names
 * @param {() => void} handler
 */
export function follow(model, names, handler) {
  const events = names.map((name) => `change:${name}`);
  events.forEach((event) => model.on(event, handler));
  return () => events.forEach((event) => model.off(event, handler));
}

/**
 * What most widgets end with: draw, now and whenever one of `names` changes; what `draw` answers is then said to screen
 * readers. Answers how to close the view.
 * @param {HTMLElement} root
 * @param {Model} model
 * @param {string[]} names
 * @param {() => string} draw
 * @param {{ describe?: Parameters<typeof tooltip>[1], stops?: (() => void)[] }} options
 */
export function live(root, model, names, draw, { describe, stops = [] } = {}) {
  const status = announcer();
  root.append(status.el);
  tooltip(root, describe);
  const off = follow(model, names, () => status.say(draw()));
  draw();
  return () => [off, status.stop, ...stops].forEach((stop) => stop());
}

/**
 * A head chosen in one picture is chosen in all of a page that show a grid of the same size. Answers how to stop.
 * @param {Model} model with the trait `selected`
 * @param {number} layers
 * @param {number} heads
 */
export function shareSelection(model, layers, heads) {
  if (layers === 1) return () => {}; // a case by hand is about its own two heads
  let hearing = false;
  const tell = () => {
    const detail = { layers, heads, selected: model.get("selected"), from: model };
    if (!hearing) document.dispatchEvent(new CustomEvent("headkv-selected", { detail }));
  };
  const hear = (event) => {
    const { selected, from } = event.detail;
    if (from === model || event.detail.layers !== layers || event.detail.heads !== heads) return;
    hearing = true;
    model.set("selected", selected);
    hearing = false;
    model.save_changes();
  };
  document.addEventListener("headkv-selected", hear);
  const off = follow(model, ["selected"], tell);
  return () => {
    off();
    document.removeEventListener("headkv-selected", hear);
  };
}

/**
 * Call `work` at most once per `wait` milliseconds, the last call always counting.
 * @param {() => void} work
 * @param {number} wait
 */
export function throttle(work, wait) {
  let timer = 0;
  const run = () => {
    timer ||= setTimeout(() => {
      timer = 0;
      work();
    }, wait);
  };
  run.cancel = () => clearTimeout(timer);
  return run;
}
