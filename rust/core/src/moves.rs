//! The two moves of entries. They copy bytes, so that keys and values may be stored in any way, and each in another.

use crate::error::{Error, Result, check_len};
use crate::layer::Rows;
use crate::threads;

/// Bytes below which one thread copies everything.
const SERIAL_BYTES: usize = 1 << 20;

/// What an entry has: a key, a value, and two scales where those are codes.
const NAMES: [&str; 3] = ["keys", "values", "scales"];

/// Storage of one layer, to be written.
pub struct Pools<'a> {
    /// Bytes that a slot has of keys, values and scales; none of what is not there.
    pub widths: [usize; 3],
    /// `[slots, width]` bytes of keys, values and scales
    pub columns: [&'a mut [u8]; 3],
    /// `[slots]`
    pub positions: &'a mut [i32],
}

impl Pools<'_> {
    fn check(&self) -> Result<()> {
        check_columns(&self.widths, self.columns.each_ref().map(|x| x.len()), self.positions.len(), "")
    }
}

fn check_columns(widths: &[usize; 3], found: [usize; 3], count: usize, of: &str) -> Result<()> {
    for ((name, width), found) in NAMES.iter().zip(widths).zip(found) {
        let wanted = count.checked_mul(*width);
        let wanted = wanted.ok_or_else(|| Error::new(format!("{of}{name} must fit the address space")))?;
        check_len(&format!("{of}{name}"), found, wanted)?;
    }
    Ok(())
}

/// New entries for every row: T tokens of B sequences.
#[derive(Clone, Copy)]
pub struct Entries<'a> {
    pub batch: usize,
    pub steps: usize,
    /// `[B, H, T, width]` bytes of keys, values and scales
    pub columns: [&'a [u8]; 3],
    /// `[B, T]`, false where a token is not stored; all are when None
    pub valid: Option<&'a [bool]>,
    /// Position in the text of the first token.
    pub first_position: i64,
}

/// Writes the entries behind the `length[r]` entries of each row; each row must have room for them.
pub fn append(pools: &mut Pools, rows: &Rows, entries: &Entries, threads: usize) -> Result<()> {
    let widths = pools.widths;
    pools.check()?;
    rows.check(pools.positions.len())?;
    let order = rows.disjoint_order()?;
    let (count, steps) = (rows.count(), entries.steps);
    let kv_heads = count.checked_div(entries.batch).unwrap_or(0);
    if kv_heads * entries.batch != count {
        return Err(Error::new(format!(
            "rows must be a multiple of batch, got {count} and {}",
            entries.batch
        )));
    }
    let new = count.checked_mul(steps).ok_or_else(|| Error::new("new keys must fit the address space"))?;
    check_columns(&widths, entries.columns.map(<[u8]>::len), new, "new ")?;
    if let Some(valid) = entries.valid {
        check_len("valid", valid.len(), entries.batch * steps)?;
    }
    let last = entries.first_position.checked_add(steps as i64);
    if entries.first_position < 0 || last.is_none_or(|last| last > i64::from(i32::MAX)) {
        return Err(Error::new(format!(
            "positions must fit 31 bits, got {steps} from {}",
            entries.first_position
        )));
    }
    let stored = |row: usize| {
        let valid = entries.valid.map(|valid| &valid[row / kv_heads * steps..][..steps]);
        (0..steps).filter(move |&step| valid.is_none_or(|valid| valid[step]))
    };
    for row in 0..count {
        let (wanted, room) = (stored(row).count() as i64, rows.capacity[row] - rows.length[row]);
        if wanted > room {
            return Err(Error::new(format!(
                "row {row} must have room for {wanted} new entries, got room for {room}"
            )));
        }
    }

    let mut work = Vec::with_capacity(count);
    let (mut columns, mut positions) = (pools.columns.each_mut().map(|x| &mut **x), &mut *pools.positions);
    let mut cut = 0;
    for row in order {
        let (begin, end) = (rows.start[row] + rows.length[row], rows.start[row] + rows.capacity[row]);
        let (skip, take) = (begin as usize - cut, (end - begin) as usize);
        work.push((row, split_all(&mut columns, &widths, skip, take), split(&mut positions, skip, take)));
        cut = end as usize;
    }
    let threads = if new * widths.iter().sum::<usize>() < SERIAL_BYTES { 1 } else { threads };
    threads::for_each(threads, work, |(row, mut columns, positions)| {
        for (slot, step) in stored(row).enumerate() {
            copy(&mut columns, slot, &entries.columns, row * steps + step, &widths);
            positions[slot] = (entries.first_position + step as i64) as i32;
        }
    });
    Ok(())
}

/// Copies slot `source[i]` of `columns` (keys, values and scales) and `positions` to slot `i` of `target`; sources past the
/// end mean the last slot.
pub fn gather(
    columns: [&[u8]; 3],
    positions: &[i32],
    source: &[i64],
    target: &mut Pools,
    threads: usize,
) -> Result<()> {
    let widths = target.widths;
    check_len("new positions", target.positions.len(), source.len())?;
    check_columns(&widths, target.columns.each_ref().map(|x| x.len()), source.len(), "new ")?;
    check_columns(&widths, columns.map(<[u8]>::len), positions.len(), "")?;
    if source.is_empty() {
        return Ok(());
    }
    if positions.is_empty() {
        return Err(Error::new("pools must hold at least one slot to gather from, got none"));
    }
    if let Some(wrong) = source.iter().find(|&&slot| slot < 0) {
        return Err(Error::new(format!("source must be at least 0, got {wrong}")));
    }
    let last = positions.len() as i64 - 1;
    let serial = source.len() * widths.iter().sum::<usize>() < SERIAL_BYTES;
    let threads = if serial { 1 } else { threads.max(1) };
    let share = source.len().div_ceil(if threads > 1 { threads * 4 } else { 1 });
    let mut rest = target.columns.each_mut().map(|x| &mut **x);
    let shares = source.chunks(share).zip(target.positions.chunks_mut(share));
    let work =
        shares.map(|(source, to)| (source, split_all(&mut rest, &widths, 0, source.len()), to)).collect();
    threads::for_each(threads, work, |(source, mut new_columns, new_positions)| {
        for (slot, &from) in source.iter().enumerate() {
            let from = from.min(last) as usize;
            copy(&mut new_columns, slot, &columns, from, &widths);
            new_positions[slot] = positions[from];
        }
    });
    Ok(())
}

/// Entry `from` of `source` becomes entry `to` of `target`.
#[inline]
fn copy(target: &mut [&mut [u8]; 3], to: usize, source: &[&[u8]; 3], from: usize, widths: &[usize; 3]) {
    for ((target, source), &width) in target.iter_mut().zip(source).zip(widths) {
        target[to * width..][..width].copy_from_slice(&source[from * width..][..width]);
    }
}

/// Cuts `take` slots out of each of `rest`, after `skip` that nobody gets.
fn split_all<'a>(
    rest: &mut [&'a mut [u8]; 3],
    widths: &[usize; 3],
    skip: usize,
    take: usize,
) -> [&'a mut [u8]; 3] {
    std::array::from_fn(|i| split(&mut rest[i], skip * widths[i], take * widths[i]))
}

/// Cuts `take` elements out of `rest`, after `skip` that nobody gets.
fn split<'a, T>(rest: &mut &'a mut [T], skip: usize, take: usize) -> &'a mut [T] {
    let (mine, after) = std::mem::take(rest)[skip..].split_at_mut(take);
    *rest = after;
    mine
}
