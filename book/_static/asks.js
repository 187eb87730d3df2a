// Lets a reader answer: <!-- ask: label = 122500 ±10% tokens --> or <!-- ask: label = ( ) fewer (x) more -->
//
// The comment stands in the text of a page, where a notebook shows nothing of it; here it becomes a small form. In a box
// (Predict) any answer counts, and what the next cell shows waits for it. In an exercise the page says right or not yet.
(() => {
  "use strict";
  const ASK = /^\s*ask:\s*(?:([^=]*?)\s*=\s*)?(.+?)\s*$/s;
  const NUMBER = /^(-?[\d,_.]+)(?:\s*±\s*([\d.]+)(%?))?(?:\s+(.+))?$/;
  let asked = 0;

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  /** What a pattern finds in a text, which must have it. @param {RegExp} pattern @param {string} text */
  function parts(pattern, text) {
    const found = pattern.exec(text);
    if (!found) throw new Error(`not a question that can be asked: ${text}`);
    return found;
  }

  /** A number as people write it, 57,344 or 57 344 bytes; NaN if it is none. */
  const plain = (text) => Number.parseFloat(text.replace(/[,_\s]/g, ""));

  /** A field for a number: `read` says whether it is right, and what it is else; null if there is none. */
  function numberField(label, answer) {
    const [, digits, tolerance, percent, unit = ""] = parts(NUMBER, answer);
    const value = plain(digits);
    const slack = tolerance ? Number(tolerance) * (percent ? Math.abs(value) / 100 : 1) : 1e-9;
    const input = el("input", { type: "text", inputmode: "decimal", autocomplete: "off", size: 9 });
    const read = () => {
      const isShare = /%\s*$/.test(input.value) && !unit.startsWith("%"); // 51% where .51 is asked
      const guess = plain(input.value) / (isShare ? 100 : 1);
      if (Number.isNaN(guess)) return null;
      return { right: Math.abs(guess - value) <= slack, hint: guess > value ? "Too high." : "Too low." };
    };
    const shown = `${tolerance ? "about " : ""}${digits.replace(/_/g, ",")}${unit ? ` ${unit}` : ""}`;
    return { el: el("label", {}, `${label} `, input, unit ? ` ${unit}` : ""), read, shown, need: "Type a number." };
  }

  /** Some answers to choose from, the right one marked by an x. */
  function choiceField(label, answer) {
    const name = `ask-choice-${++asked}`;
    const options = [...answer.matchAll(/\(([ x])\)\s*([^(]+)/g)].map(([, mark, text]) => ({
      right: mark === "x",
      text: text.trim(),
      input: el("input", { type: "radio", name }),
    }));
    const read = () => {
      const chosen = options.find(({ input }) => input.checked);
      return chosen ? { right: chosen.right, hint: "" } : null;
    };
    const shown = options.filter(({ right }) => right).map(({ text }) => text).join(", ");
    const labels = options.map(({ input, text }) => el("label", {}, input, ` ${text}`));
    return { el: el("fieldset", {}, el("legend", {}, label), ...labels), read, shown, need: "Choose one." };
  }

  /** The form in place of one comment; `done` is called at the first answer. */
  function form(comment, done) {
    const [, given, answer] = parts(ASK, comment.data);
    const box = comment.parentElement?.closest(".admonition");
    const label = given || (box ? "Your guess:" : "Your answer:");
    const field = (answer.startsWith("(") ? choiceField : numberField)(label, answer);
    const verdict = el("output", {});
    const node = el("form", { class: "ask", "data-ask": box ? "guess" : "exercise" });
    node.append(field.el, el("button", { type: "submit" }, box ? "Guess" : "Check"), verdict);
    node.addEventListener("submit", (event) => {
      event.preventDefault();
      const said = field.read();
      verdict.className = said ? (said.right ? "ask-right" : "ask-wrong") : "";
      if (!said) verdict.textContent = field.need;
      else if (said.right) verdict.textContent = box ? `✓ Yes: ${field.shown}.` : "✓ Right.";
      else verdict.textContent = box ? `✗ It is ${field.shown}.` : `✗ Not yet. ${said.hint}`.trim();
      if (said) done();
    });
    return node;
  }

  /** What the cell behind a box shows, kept back until `show` is called; null if nothing is to be kept back. */
  function reveal(box) {
    const cell = box.nextElementSibling;
    if (!cell?.classList.contains("cell")) return null;
    const outputs = [...cell.querySelectorAll(":scope > .cell_output")];
    const folds = outputs.length ? [] : [...cell.querySelectorAll("details")]; // else the fold hides code alone
    const isPicture = cell.querySelector('script[type="application/vnd.jupyter.widget-view+json"]');
    if (isPicture || !(folds.length || outputs.length)) return null;
    const more = el("button", { type: "button", class: "ask-show" }, "Show it without a guess");
    const veil = outputs.length ? el("p", { class: "ask-veil" }, "The result waits for your guess. ", more) : null;
    const show = () => {
      for (const fold of folds) fold.open = true;
      for (const output of outputs) output.hidden = false;
      veil?.remove();
    };
    more.addEventListener("click", show);
    for (const output of outputs) output.hidden = true;
    if (veil) cell.append(veil);
    return show;
  }

  function start() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_COMMENT);
    /** @type {Comment[]} */
    const comments = [];
    while (walker.nextNode()) {
      const comment = /** @type {Comment} */ (walker.currentNode);
      if (ASK.test(comment.data)) comments.push(comment);
    }
    const boxes = new Map(); // how many questions of a box are open
    const last = new Map(); // the form that stands behind a paragraph already
    for (const comment of comments) {
      const box = comment.parentElement?.closest(".admonition");
      const state = boxes.get(box) ?? { open: 0, show: box && reveal(box) };
      if (box) boxes.set(box, state);
      state.open += 1;
      let answered = false;
      const node = form(comment, () => {
        if (answered) return;
        answered = true;
        state.open -= 1;
        if (box && !state.open) state.show?.();
      });
      const block = comment.parentElement?.closest("p") ?? comment;
      (last.get(block) ?? block).after(node);
      last.set(block, node);
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
