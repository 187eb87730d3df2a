//! The two moves of entries. They copy bits, so the storage type need not be a number.

use crate::error::{Error, Result, check_len};
use crate::layer::Rows;
use crate::threads;

/// Elements below which one thread copies everything.
const SERIAL_ELEMENTS: usize = 1 << 18;

/// Storage of one layer, to be written: `keys` and `values` `[slots, D]`, `positions` `[slots]`, and the bytes of any
/// scales, `[slots, bytes of a slot's]`; empty where there are none.
pub struct Pools<'a, T> {
    pub head_dim: usize,
    pub keys: &'a mut [T],
    pub values: &'a mut [T],
    pub positions: &'a mut [i32],
    pub scales: &'a mut [u8],
}

impl<T> Pools<'_, T> {
    /// How many bytes a slot's scales have.
    fn check(&self) -> Result<usize> {
        check_pools(self.head_dim, self.keys.len(), self.values.len(), self.positions.len())?;
        let bytes = self.scales.len().checked_div(self.positions.len()).unwrap_or(0);
        check_len("scales", self.scales.len(), bytes * self.positions.len())?;
        Ok(bytes)
    }
}

fn check_pools(head_dim: usize, keys: usize, values: usize, slots: usize) -> Result<()> {
    if head_dim == 0 {
        return Err(Error::new("head_dim must be positive, got 0"));
    }
    let elements = slots
        .checked_mul(head_dim)
        .ok_or_else(|| Error::new("slots * head_dim must fit the address space"))?;
    check_len("keys", keys, elements)?;
    check_len("values", values, elements)
}

/// New entries for every row: T tokens of B sequences.
#[derive(Clone, Copy)]
pub struct Entries<'a, T> {
    pub batch: usize,
    pub steps: usize,
    /// `[B, H, T, D]`
    pub keys: &'a [T],
    /// `[B, H, T, D]`
    pub values: &'a [T],
    /// `[B, H, T, bytes of a slot's]`, or empty
    pub scales: &'a [u8],
    /// `[B, T]`, false where a token is not stored; all are when None
    pub valid: Option<&'a [bool]>,
    /// Position in the text of the first token.
    pub first_position: i64,
}

/// Writes the entries behind the `length[r]` entries of each row; each row must have room for them.
pub fn append<T: Copy + Send + Sync>(
    pools: &mut Pools<T>,
    rows: &Rows,
    entries: &Entries<T>,
    threads: usize,
) -> Result<()> {
    let dim = pools.head_dim;
    let bytes = pools.check()?;
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
    let elements = count.checked_mul(steps).and_then(|n| n.checked_mul(dim));
    let elements = elements.ok_or_else(|| Error::new("keys must fit the address space"))?;
    check_len("new keys", entries.keys.len(), elements)?;
    check_len("new values", entries.values.len(), elements)?;
    check_len("new scales", entries.scales.len(), elements / dim * bytes)?;
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
    let (mut keys, mut values, mut positions) = (&mut *pools.keys, &mut *pools.values, &mut *pools.positions);
    let mut scales = &mut *pools.scales;
    let mut cut = 0;
    for row in order {
        let (begin, end) = (rows.start[row] + rows.length[row], rows.start[row] + rows.capacity[row]);
        let (skip, take) = (begin as usize - cut, (end - begin) as usize);
        let mine = split(&mut keys, skip * dim, take * dim);
        let my_values = split(&mut values, skip * dim, take * dim);
        let my_scales = split(&mut scales, skip * bytes, take * bytes);
        work.push((row, mine, my_values, split(&mut positions, skip, take), my_scales));
        cut = end as usize;
    }
    let threads = if elements < SERIAL_ELEMENTS { 1 } else { threads };
    threads::for_each(threads, work, |(row, keys, values, positions, scales)| {
        let source = row * steps;
        for (slot, step) in stored(row).enumerate() {
            let from = (source + step) * dim..(source + step + 1) * dim;
            keys[slot * dim..][..dim].copy_from_slice(&entries.keys[from.clone()]);
            values[slot * dim..][..dim].copy_from_slice(&entries.values[from]);
            let from = (source + step) * bytes..(source + step + 1) * bytes;
            scales[slot * bytes..][..bytes].copy_from_slice(&entries.scales[from]);
            positions[slot] = (entries.first_position + step as i64) as i32;
        }
    });
    Ok(())
}

/// Cuts `take` elements out of `rest`, after `skip` that nobody gets.
fn split<'a, T>(rest: &mut &'a mut [T], skip: usize, take: usize) -> &'a mut [T] {
    let (mine, after) = std::mem::take(rest)[skip..].split_at_mut(take);
    *rest = after;
    mine
}

/// Copies slot `source[i]` of `keys`, `values`, `positions` and `scales` to slot `i` of `target`; sources past the end mean
/// the last slot.
pub fn gather<T: Copy + Send + Sync>(
    (keys, values, positions, scales): (&[T], &[T], &[i32], &[u8]),
    source: &[i64],
    target: &mut Pools<T>,
    threads: usize,
) -> Result<()> {
    let dim = target.head_dim;
    target.check()?;
    check_pools(dim, keys.len(), values.len(), positions.len())?;
    let bytes = scales.len().checked_div(positions.len()).unwrap_or(0);
    check_len("scales", scales.len(), bytes * positions.len())?;
    check_len("new scales", target.scales.len(), bytes * source.len())?;
    check_len("new positions", target.positions.len(), source.len())?;
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
    let threads = if source.len() * dim < SERIAL_ELEMENTS { 1 } else { threads.max(1) };
    let share = source.len().div_ceil(if threads > 1 { threads * 4 } else { 1 });
    let mut new_scales = &mut *target.scales;
    let work = source
        .chunks(share)
        .zip(target.keys.chunks_mut(share * dim))
        .zip(target.values.chunks_mut(share * dim))
        .zip(target.positions.chunks_mut(share))
        .map(|parts| {
            let count = parts.1.len();
            (parts, split(&mut new_scales, 0, count * bytes))
        })
        .collect();
    threads::for_each(threads, work, |((((source, new_keys), new_values), new_positions), new_scales)| {
        for (slot, &from) in source.iter().enumerate() {
            let from = from.min(last) as usize;
            new_keys[slot * dim..][..dim].copy_from_slice(&keys[from * dim..][..dim]);
            new_values[slot * dim..][..dim].copy_from_slice(&values[from * dim..][..dim]);
            new_positions[slot] = positions[from];
            new_scales[slot * bytes..][..bytes].copy_from_slice(&scales[from * bytes..][..bytes]);
        }
    });
    Ok(())
}
