// The moves of a ragged pool, as headkv.cache.RaggedLayer makes them, on entries that are mere numbers.
// A pool is { rows: [{ capacity, entries: [position] }] }; rows lie one after another. Each operation answers the pool
// it leads to and the list of single moves, so that a reader can watch them one by one.

/**
 * @typedef {{ capacity: number, entries: number[] }} Row
 * @typedef {{ rows: Row[] }} Pool
 * @typedef {{ sinks: number, recent: number }} Window recent 0: no window
 * @typedef {{ row: number, at: number }} Move
 * @typedef {{ pool: Pool, moves: Move[], fresh: boolean }} Operation fresh: into a new pool
 */

/** @param {Pool} pool */
export const poolStored = (pool) => pool.rows.reduce((sum, row) => sum + row.entries.length, 0);
/** @param {Pool} pool */
export const poolSlots = (pool) => pool.rows.reduce((sum, row) => sum + row.capacity, 0);

/** @param {Pool} pool @returns {Pool} */
export const emptied = (pool) => ({ rows: pool.rows.map((row) => ({ ...row, entries: [] })) });

/**
 * Entries that a windowed row hides: all behind its sinks but the last `recent`.
 * @param {Row} row
 * @param {Window} window
 */
function trimmable(row, { sinks, recent }) {
  return recent ? Math.max(0, row.entries.length - sinks - recent) : 0;
}

/** @param {Row} row @param {Window} window */
const withoutHidden = (row, window) => {
  const skip = trimmable(row, window);
  return row.entries.filter((_, i) => i < window.sinks || i >= window.sinks + skip);
};

/**
 * New pools with `capacity(row)` slots a row: every kept entry is copied once.
 * @param {number[][]} entries
 * @param {(kept: number[], row: number) => number} capacityOfRow
 * @returns {Operation}
 */
function rewritten(entries, capacityOfRow) {
  const rows = entries.map((kept, r) => ({ capacity: capacityOfRow(kept, r), entries: kept }));
  const moves = rows.flatMap((row, r) => row.entries.map((_, at) => ({ row: r, at })));
  return { pool: { rows }, moves, fresh: true };
}

/**
 * Room for one more entry in every row: trim windows in place where that is enough, else rewrite with more room.
 * @param {Pool} pool
 * @param {Window[]} windows
 * @param {number} headroom
 * @param {number} growth
 * @returns {Operation | null}
 */
export function makeRoom(pool, windows, headroom, growth) {
  if (pool.rows.every((row) => row.entries.length < row.capacity)) return null;
  const entries = pool.rows.map((row, r) => withoutHidden(row, windows[r]));
  if (pool.rows.every((row, r) => entries[r].length < row.capacity)) return trimmed(pool, windows);
  const mean = entries.reduce((sum, kept) => sum + kept.length, 0) / entries.length;
  const room = Math.max(1, headroom, Math.floor(mean * growth));
  return rewritten(entries, (kept, r) => kept.length + (windows[r].recent ? Math.max(1, headroom) : room));
}

/**
 * Trim windowed rows within their slots: the recent entries move down behind the sinks.
 * @param {Pool} pool
 * @param {Window[]} windows
 * @returns {Operation}
 */
export function trimmed(pool, windows) {
  const rows = pool.rows.map((row, r) => ({ ...row, entries: withoutHidden(row, windows[r]) }));
  const moves = rows.flatMap((row, r) =>
    trimmable(pool.rows[r], windows[r]) ? row.entries.map((_, at) => ({ row: r, at })).slice(windows[r].sinks) : []
  );
  return { pool: { rows }, moves, fresh: false };
}

/**
 * One new token: an entry behind each row.
 * @param {Pool} pool
 * @param {number} position
 * @returns {Operation}
 */
export function appended(pool, position) {
  const rows = pool.rows.map((row) => ({ ...row, entries: [...row.entries, position] }));
  return { pool: { rows }, moves: rows.map((row, r) => ({ row: r, at: row.entries.length - 1 })), fresh: false };
}

/**
 * Keep what is not marked, in new tight pools with head room behind each row.
 * @param {Pool} pool
 * @param {Set<string>} marked "row:position"
 * @param {number} headroom
 */
export function evicted(pool, marked, headroom) {
  const entries = pool.rows.map((row, r) => row.entries.filter((position) => !marked.has(`${r}:${position}`)));
  return rewritten(entries, (kept) => kept.length + headroom);
}
