// RaggedPool: unequal rows in one flat pool. Append, evict and trim, move by move, with the bytes that each moved.

import { announcer, button, bytesText, count, h, player, throttle, times, tooltip, widgetRoot } from "./toolkit.js";
import { appended, emptied, evicted, makeRoom, poolSlots, poolStored, trimmed } from "./pool_moves.js";

/** @import { Model } from "./toolkit.js" */

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const get = (name) => model.get(name);
  const entryBytes = get("bytes_per_entry");
  const headroom = get("headroom");
  const windows = get("windows").map(([sinks, recent]) => ({ sinks, recent }));
  const windowed = windows.some((w) => w.recent);
  let pool, seen, marked, queue, done, old, freed, moved, copied, log, told;

  const slotsBox = h("div.pool", { role: "group", "aria-label": "The pool, slot by slot" });
  const oldBox = h("div.pool.pool-old", { "aria-hidden": "true" });
  const oldNote = h("p.caption");
  const newNote = h("p.caption");
  const story = h("p.story.pool-story");
  const status = announcer();
  const tallies = ["This cache", "A cache that copies itself at every append"].map((label) => {
    const fill = h("div.tally-fill");
    const number = h("b");
    return { fill, number, el: h("div.tally", {}, h("span", {}, label), number, h("div.tally-bar", {}, fill)) };
  });

  const steps = [
    button("Append one token", () => start(appendOps()), { "data-control": "append" }),
    button("Evict marked", () => start([["evict", () => evicted(pool, marked, headroom)]]), {
      "data-control": "evict",
    }),
  ];
  if (windowed) {
    steps.push(
      button("Trim windows", () => start([["trim", () => trimmed(pool, windows)]]), { "data-control": "trim" }),
    );
  }
  const controls = player({
    noun: "move one entry",
    every: 170,
    reset: () => reset(),
    advance: (n) => {
      if (n === 0) return true; // there is always a next token
      clearInterval(timer);
      if (!busy()) load(appendOps());
      for (let i = 0; i < n; i++) forward();
      return true;
    },
  });

  let current = null; // { pool, moves, fresh, name }: the operation that is being played
  const moves = () => current?.moves ?? [];
  function appendOps() {
    return [
      ["room", () => makeRoom(pool, windows, headroom, get("growth"))],
      ["append", () => appended(pool, seen++)],
    ];
  }
  const busy = () => current !== null;

  function load(ops) {
    queue = ops;
    told = [];
    nextOp();
  }
  function nextOp() {
    current = null;
    while (queue.length && !current) {
      const [name, plan] = queue.shift();
      const result = plan();
      if (!result) continue;
      current = { ...result, name };
      done = 0;
      old = pool;
      if (name === "append" || name === "evict") copied += poolStored(result.pool);
      if (!result.moves.length) finish();
    }
    draw();
  }
  function finish() {
    told.push(explain(current, old, told.length > 0));
    log = told.join(" ");
    if (current.fresh) freed = old;
    pool = current.pool;
    if (current.name === "evict") marked.clear();
    current = null;
    done = 0;
  }
  /** One entry moves. */
  function forward() {
    if (!busy()) return;
    done++;
    moved++;
    if (done >= moves().length) {
      finish();
      nextOp();
    } else draw();
  }
  function settle() {
    while (busy()) forward();
  }
  /** Play an operation by itself; without motion where the reader asked for none. */
  function start(ops) {
    controls.pause();
    settle();
    load(ops);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return settle();
    timer = setInterval(() => (busy() ? forward() : clearInterval(timer)), 110);
  }
  let timer = 0;
  function reset() {
    clearInterval(timer);
    seen = Math.max(...get("lengths")); // shorter rows lost their first entries before
    pool = {
      rows: get("lengths").map((length) => ({
        capacity: length + headroom,
        entries: Array.from({ length }, (_, i) => seen - length + i),
      })),
    };
    [marked, queue, done, old, freed, moved, copied, current] = [new Set(), [], 0, null, null, 0, 0, null];
    log = "";
    for (let i = 0; i < get("appended"); i++) {
      load(appendOps());
      settle();
    }
    log += `${log && " "}Append a token and watch who has room; or choose entries to mark them, then evict.`;
    draw();
  }

  const isDone = (r, at) => moves().findIndex((m) => m.row === r && m.at === at);
  /** Every row of a pool; `live`: its entries can be marked, and are counted under it. */
  function slotsOf(shown, live) {
    let start = 0;
    return shown.rows.map((row, r) => {
      const cells = Array.from({ length: row.capacity }, (_, at) => slot(row, r, at, start + at, live));
      const window = windows[r].recent ? `, sees ${times(windows[r].sinks, "sink")} + ${windows[r].recent} recent` : "";
      const words = live
        ? `row ${r}: start ${start}, length ${row.entries.length} of ${row.capacity}${window}`
        : `row ${r}`;
      const box = h("div.pool-row", {}, h("div.pool-slots", {}, ...cells), h("small", {}, words));
      start += row.capacity;
      return box;
    });
  }
  function slot(row, r, at, index, live) {
    const position = row.entries[at];
    const turn = live && busy() ? isDone(r, at) : -1;
    const waiting = turn >= 0 && turn >= done && (current.fresh || current.name === "append");
    if (position === undefined || waiting) {
      return h("span.slot.slot-free", { "data-tip": `slot ${index}: free, head room of row ${r}` });
    }
    const key = `${r}:${position}`;
    const hidden = windows[r].recent && at >= windows[r].sinks && at < row.entries.length - windows[r].recent;
    const sort = turn >= 0 && turn === done - 1 ? "slot-now" : "slot-full";
    const cell = h(`button.slot.${sort}`, {
      type: "button",
      "aria-pressed": String(marked.has(key)),
      disabled: !live || busy(),
      "data-tip": `slot ${index}: row ${r}, position ${position}${hidden ? ", hidden by the window" : ""}`,
      "data-key": key,
      "aria-label": `row ${r}, position ${position}`,
      onclick: () => {
        const last = row.entries.filter((p) => !marked.has(`${r}:${p}`)).length === 1;
        if (marked.has(key)) marked.delete(key);
        else if (last) log = `Row ${r} must keep one entry: no row is ever left empty.`;
        else marked.add(key);
        draw();
        /** @type {HTMLElement | null} */ (slotsBox.querySelector(`[data-key="${key}"]`))?.focus();
      },
    }, String(position));
    if (hidden) cell.classList.add("hk-slot-hidden");
    return cell;
  }

  function draw() {
    const fresh = busy() && current.fresh;
    const shown = busy() ? current.pool : pool;
    // What was freed stays in sight, emptied: the picture does not jump back, and old and new can be compared.
    oldBox.hidden = oldNote.hidden = !fresh && !freed;
    if (fresh) oldBox.replaceChildren(...slotsOf(old, false));
    else if (freed) oldBox.replaceChildren(...slotsOf(emptied(freed), false));
    oldNote.textContent = fresh
      ? "old pool, freed once the last entry has moved"
      : freed
      ? `old pool: its ${count(poolSlots(freed))} slots are freed`
      : "";
    slotsBox.replaceChildren(...slotsOf(shown, true));
    newNote.textContent = fresh
      ? `new pool: ${count(poolSlots(shown))} slots`
      : `the pool: ${count(poolSlots(shown))} slots, ${count(poolStored(shown))} entries`;
    if (!marked.size && document.activeElement === steps[1]) steps[0].focus(); // what is disabled loses the focus
    steps[1].disabled = !marked.size;
    const amounts = [moved * entryBytes, copied * entryBytes];
    tallies.forEach(({ fill, number }, i) => {
      number.textContent = bytesText(amounts[i]);
      fill.style.width = `${(100 * amounts[i]) / Math.max(...amounts, 1)}%`;
    });
    story.textContent = busy() ? doing(current) : log;
    if (!busy()) status.say(`${log} ${bytesText(amounts[0])} moved; by copying, ${bytesText(amounts[1])}.`);
    model.set("state", {
      lengths: shown.rows.map((row) => row.entries.length),
      capacities: shown.rows.map((row) => row.capacity),
      moved: amounts[0],
      copied: amounts[1],
      busy: busy(),
    });
    root.dataset.state = JSON.stringify(model.get("state"));
    sync();
  }
  const sync = throttle(() => model.save_changes(), 150);

  const root = widgetRoot(
    "ragged-pool",
    get("title"),
    "A ragged pool",
    h("div.pool-buttons", {}, ...steps, h("span.gap"), controls.el),
    story,
    oldNote,
    oldBox,
    newNote,
    slotsBox,
    h(
      "div.key",
      {},
      h("span.key-item.key-entry", {}, "entry, by its position"),
      h("span.key-item.key-marked", {}, "marked to go"),
      ...(windowed ? [h("span.key-item.key-outside", {}, "outside the window")] : []),
      h("span.key-item.key-free", {}, "head room"),
    ),
    h(
      "div.tallies",
      {},
      h("p.caption", {}, `Bytes moved, ${bytesText(entryBytes)} an entry`),
      ...tallies.map((t) => t.el),
    ),
    status.el,
  );
  el.append(root);
  tooltip(root);
  reset();
  return () => {
    controls.pause();
    clearInterval(timer);
    status.stop();
    sync.cancel();
  };
}

const doing = ({ name, fresh, moves }) =>
  ({
    room: fresh
      ? `A row is full: the whole pool moves, ${times(moves.length, "entry", "entries")}, into one with more room.`
      : "A windowed row is full: its recent entries move down behind the sinks.",
    append: "One entry is written behind each row, in place.",
    evict: "What stays is gathered into a new, tight pool.",
    trim: "The recent entries of windowed rows move down behind the sinks.",
  })[name];

/** What was done, in the past tense; `then`: something else was done just before. */
function explain({ name, moves, pool, fresh }, before, then) {
  const entries = times(moves.length, "entry", "entries");
  return {
    room: fresh
      ? `A row was full: ${entries} moved into a new pool of ${count(poolSlots(pool))} slots.`
      : `A windowed row was full: ${entries} moved down behind its sinks.`,
    append: then
      ? `Then ${entries} ${moves.length === 1 ? "was" : "were"} written.`
      : `Appended: ${entries} written, nothing else touched.`,
    evict: `Evicted: ${entries} kept; the pool went from ${count(poolSlots(before))} to ${
      count(poolSlots(pool))
    } slots.`,
    trim: moves.length
      ? `Trimmed: ${entries} moved down behind the sinks; what the window hid is gone.`
      : "Nothing to trim: no windowed row holds more than its window.",
  }[name];
}

export default { render };
