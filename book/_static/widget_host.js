// Brings anywidgets to life in a built page: no kernel, no network, no other library.
//
// A notebook leaves two things in the page: one script with the state of every widget (the text of its front end, `_esm`,
// included), and one script in each place where a widget was shown. This file reads the first, imports the front end from
// memory, and renders into the second, with the model interface that anywidget's front ends are written for.
(() => {
  "use strict";
  const STATE = 'script[type="application/vnd.jupyter.widget-state+json"]';
  const VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]';

  /** Values of one widget, and who wants to hear of changes. Nothing leaves the page: there is no kernel to tell. */
  class Model {
    #values;
    #listeners = []; // { event, callback }

    constructor(values, manager) {
      this.#values = values;
      this.widget_manager = manager;
    }

    get(name) {
      return this.#values[name];
    }

    set(nameOrValues, value) {
      const values = typeof nameOrValues === "object" ? nameOrValues : { [nameOrValues]: value };
      const changed = Object.keys(values).filter((name) => !same(this.#values[name], values[name]));
      Object.assign(this.#values, values);
      for (const name of changed) this.#emit(`change:${name}`, this, this.#values[name]);
      if (changed.length) this.#emit("change", this);
    }

    on(events, callback) {
      for (const event of events.split(/\s+/)) this.#listeners.push({ event, callback });
    }

    off(events, callback) {
      const named = events ? events.split(/\s+/) : null;
      this.#listeners = this.#listeners.filter(
        (one) => (named && !named.includes(one.event)) || (callback && one.callback !== callback),
      );
    }

    save_changes() {}

    send() {}

    #emit(event, ...args) {
      for (const one of [...this.#listeners]) if (one.event === event) one.callback(...args);
    }
  }

  function same(a, b) {
    if (a === b || (Number.isNaN(a) && Number.isNaN(b))) return true;
    if (!a || !b || typeof a !== "object" || ArrayBuffer.isView(a) || ArrayBuffer.isView(b)) return false;
    return JSON.stringify(a) === JSON.stringify(b);
  }

  /** The saved values of one widget, each binary one put back in its place as a DataView. */
  function restore({ state, buffers = [] }) {
    const values = { ...state };
    for (const { path, data, encoding } of buffers) {
      if (encoding !== "base64") throw new Error(`a buffer in encoding ${encoding}; only base64 is known`);
      const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
      const parent = path.slice(0, -1).reduce((object, key) => object[key], values);
      parent[path.at(-1)] = new DataView(bytes.buffer);
    }
    return values;
  }

  /** Imports a front end from memory; equal texts are imported once. */
  const modules = new Map();
  function load(text) {
    if (!modules.has(text)) {
      const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
      const found = import(address).then((module) => {
        URL.revokeObjectURL(address);
        const given = module.default ?? module;
        return typeof given === "function" ? given() : given;
      });
      modules.set(text, found);
    }
    return modules.get(text);
  }

  const styles = new Set();
  function style(text) {
    if (!text || styles.has(text)) return;
    styles.add(text);
    document.head.append(Object.assign(document.createElement("style"), { textContent: text }));
  }

  /** All widgets of one page, by id; each is made once, however often it is shown. */
  class Manager {
    #saved;
    #made = new Map();

    constructor(saved) {
      this.#saved = saved;
    }

    async get_model(id) {
      return (await this.make(id)).model;
    }

    make(id) {
      if (!this.#made.has(id)) this.#made.set(id, this.#make(id));
      return this.#made.get(id);
    }

    async #make(id) {
      const saved = this.#saved[id];
      if (!saved) throw new Error(`the page holds no state of widget ${id}`);
      if (!saved.state._esm) throw new Error(`${saved.model_name} is no anywidget; only those live in a built page`);
      const model = new Model(restore(saved), this);
      const frontEnd = await load(saved.state._esm);
      const signal = new AbortController().signal;
      await frontEnd.initialize?.({ model, signal, experimental });
      return { model, frontEnd, signal };
    }

    async render(id, el) {
      const { model, frontEnd, signal } = await this.make(id);
      style(model.get("_css"));
      await frontEnd.render?.({ model, el, signal, experimental });
    }
  }

  const experimental = {
    invoke: () => Promise.reject(new Error("a built page has no kernel to ask")),
  };

  async function start() {
    const saved = {};
    for (const script of document.querySelectorAll(STATE)) Object.assign(saved, JSON.parse(script.textContent).state);
    const manager = new Manager(saved);
    const hosts = [...document.querySelectorAll(VIEW)].map((script) => {
      const el = document.createElement("div");
      el.className = "widget-host";
      el.dataset.state = "loading";
      script.after(el);
      return { el, id: JSON.parse(script.textContent).model_id };
    });
    const inView = ({ el }) => el.getBoundingClientRect().top < innerHeight;
    const [first, later] = [hosts.filter(inView), hosts.filter((host) => !inView(host))];
    for (const host of first) await show(manager, host);
    for (const host of later) {
      await idle();
      await show(manager, host);
    }
  }

  async function show(manager, { el, id }) {
    try {
      await manager.render(id, el);
      el.dataset.state = "ready";
    } catch (error) {
      el.dataset.state = "failed";
      el.textContent = `This picture could not be shown: ${error instanceof Error ? error.message : error}.`;
      console.error(error);
    }
    // What follows has its place once this is laid out, and is seen from the next frame on.
    requestAnimationFrame(() => requestAnimationFrame(() => (el.dataset.placed = "")));
  }

  /** Until the page has nothing better to do: pictures further down wait for it. */
  const idle = () =>
    new Promise((done) =>
      "requestIdleCallback" in window ? requestIdleCallback(done, { timeout: 500 }) : setTimeout(done)
    );

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
