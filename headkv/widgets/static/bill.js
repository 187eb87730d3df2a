// The bill: one bar, the bytes of the full cache, filled to what is kept; behind it, striped, the head room that rows own.
// Empty is hatched, never only paler.

import { bytesText, h, percent } from "./toolkit.js";

/**
 * `update` takes bytes; `marks` are answers measured beforehand.
 * @typedef {{ share: number, right: number, asked: number, text: string, allocator?: string }} Mark
 * @param {{ marks?: Mark[] }} options
 */
export function billBar({ marks = [] }) {
  const fill = h("div.bill-fill");
  const roomFill = h("div.bill-room");
  const bar = h("div.bill-bar", { role: "img" }, fill, roomFill);
  const amount = h("strong.bill-amount");
  const rest = h("span.bill-rest");
  const note = h("p.bill-note");
  const flags = h("div.bill-marks");
  const drawn = marks.map((mark) => {
    const state = mark.right === mark.asked ? "right" : mark.right ? "some" : "wrong";
    const sign = { right: "✓", some: "–", wrong: "✗" }[state];
    const flag = h(`span.bill-mark.${state}`, { "data-tip": mark.text }, sign);
    flag.style.left = `${100 * mark.share}%`;
    flags.append(flag);
    return { flag, mark };
  });
  const track = marks.length ? [bar, flags] : [bar];
  return {
    bar,
    el: h("div.bill", {}, h("div.bill-line", {}, amount, rest), ...track, note),
    /**
     * @param {{ kept: number, full: number, share: number, words: string, room?: number, text?: string,
     *   shows?: (mark: Mark) => boolean }} now
     */
    update({ kept, full, share, words, room = 0, text, shows = () => true }) {
      fill.style.width = `${100 * share}%`;
      amount.textContent = bytesText(kept);
      roomFill.style.width = `${(100 * room) / full}%`;
      rest.textContent = `of ${bytesText(full)}, ${percent(share, 1)} of the full cache` +
        (room ? `; ${bytesText(room)} more are free slots (striped)` : "");
      note.textContent = text ?? "";
      note.hidden = !text;
      bar.setAttribute("aria-label", words);
      bar.dataset.tip = words;
      drawn.forEach(({ flag, mark }) => (flag.hidden = !shows(mark)));
    },
  };
}
