//! A layer as its caller has it: slices of two pools, and where each row lies in them.

use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::quantised::Floats;
use crate::residual::Residual;

/// Where each row lies in the pools; every slice has one number a row.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub start: &'a [i64],
    pub length: &'a [i64],
    pub capacity: &'a [i64],
}

impl Rows<'_> {
    pub fn count(&self) -> usize {
        self.start.len()
    }

    /// Every row lies inside a pool of `slots` slots: `0 <= length <= capacity` and `0 <= start <= slots - capacity`.
    pub(crate) fn check(&self, slots: usize) -> Result<()> {
        check_len("length", self.length.len(), self.count())?;
        check_len("capacity", self.capacity.len(), self.count())?;
        for row in 0..self.count() {
            let (start, length, capacity) = (self.start[row], self.length[row], self.capacity[row]);
            let inside = start >= 0
                && (0..=capacity).contains(&length)
                && start.checked_add(capacity).is_some_and(|end| end as u64 <= slots as u64);
            if !inside {
                return Err(Error::new(format!(
                    "row {row} must lie within the {slots} slots of the pools with 0 <= length <= capacity, \
                     got start {start}, length {length}, capacity {capacity}"
                )));
            }
        }
        Ok(())
    }

    /// The rows in the order of their starts; an error when two of them overlap. Call after [`Rows::check`].
    pub(crate) fn disjoint_order(&self) -> Result<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.count()).filter(|&row| self.capacity[row] > 0).collect();
        order.sort_by_key(|&row| self.start[row]);
        for pair in order.windows(2) {
            if self.start[pair[0]] + self.capacity[pair[0]] > self.start[pair[1]] {
                return Err(Error::new(format!(
                    "rows must not overlap, got rows {} and {}",
                    pair[0], pair[1]
                )));
            }
        }
        Ok(order)
    }
}

/// What compensating rows have dropped so far: `key` and `value` `[rows, D]`, `count` `[rows]` (-1: does not compensate).
#[derive(Clone, Copy)]
pub struct Sums<'a> {
    pub key: &'a [f32],
    pub value: &'a [f32],
    pub count: &'a [i64],
}

/// One layer of a ragged cache, to be read.
#[derive(Clone, Copy)]
pub struct Layer<'a, K, V> {
    pub head_dim: usize,
    /// `[slots, D]`; `D / 2` where an element holds two channels
    pub keys: &'a [K],
    /// `[slots, D]`, as keys or in fewer bits
    pub values: &'a [V],
    /// `[slots]`, increasing within the entries of a row
    pub positions: &'a [i32],
    pub rows: Rows<'a>,
    /// `[rows]`
    pub sinks: &'a [i64],
    /// `[rows]`; more than 0 makes a windowed row
    pub recent: &'a [i64],
    pub sums: Option<Sums<'a>>,
    /// `[slots, 2]`; None where keys and values are no codes but what they stand for
    pub scales: Option<Floats<'a>>,
    /// Newest entries as they came, beside their codes
    pub residual: Option<Residual<'a>>,
}

impl<'a, K: Element, V: Element> Layer<'a, K, V> {
    pub(crate) fn check(&self) -> Result<()> {
        check_dim::<K>(self.head_dim)?;
        check_dim::<V>(self.head_dim)?;
        let slots = self.positions.len();
        let elements = slots
            .checked_mul(self.head_dim)
            .ok_or_else(|| Error::new("slots * head_dim must fit the address space"))?;
        check_len("keys", self.keys.len(), elements / K::CHANNELS)?;
        check_len("values", self.values.len(), elements / V::CHANNELS)?;
        if let Some(scales) = self.scales {
            check_len("scales", scales.len(), slots.saturating_mul(2))?;
        }
        self.rows.check(slots)?;
        let rows = self.rows.count();
        check_len("sinks", self.sinks.len(), rows)?;
        check_len("recent", self.recent.len(), rows)?;
        if let Some(row) = (0..rows).find(|&row| self.sinks[row] < 0 || self.recent[row] < 0) {
            return Err(Error::new(format!(
                "sinks and recent must be at least 0, got {} and {} for row {row}",
                self.sinks[row], self.recent[row]
            )));
        }
        if let Some(sums) = self.sums {
            check_len("key_sum", sums.key.len(), rows * self.head_dim)?;
            check_len("value_sum", sums.value.len(), rows * self.head_dim)?;
            check_len("count", sums.count.len(), rows)?;
        }
        if let Some(held) = self.residual {
            held.check(rows, self.head_dim)?;
            if self.scales.is_none() {
                return Err(Error::new("residual_keys must be given with scales only"));
            }
        }
        Ok(())
    }

    /// The same layer, whose vectors have even length.
    pub(crate) fn paired(&self) -> Layer<'a, K::Paired, V::Paired> {
        Layer {
            head_dim: self.head_dim,
            keys: K::paired(self.keys),
            values: V::paired(self.values),
            positions: self.positions,
            rows: self.rows,
            sinks: self.sinks,
            recent: self.recent,
            sums: self.sums,
            scales: self.scales,
            residual: self.residual,
        }
    }

    /// The entries of a row: keys and values `[length, D]`, positions `[length]`.
    pub(crate) fn row(&self, row: usize) -> (&'a [K], &'a [V], &'a [i32]) {
        let start = self.rows.start[row] as usize;
        let end = start + self.rows.length[row] as usize;
        let (k, v) = (self.head_dim / K::CHANNELS, self.head_dim / V::CHANNELS);
        (&self.keys[start * k..end * k], &self.values[start * v..end * v], &self.positions[start..end])
    }

    /// The scales of a row's entries.
    pub(crate) fn scales_of(&self, row: usize) -> Option<Floats<'a>> {
        let start = self.rows.start[row] as usize;
        self.scales.map(|scales| scales.of(start, start + self.rows.length[row] as usize))
    }

    /// Whether attention adds a compensation entry to this row, and how many entries its sums hold.
    pub(crate) fn compensates(&self, row: usize) -> Option<i64> {
        self.sums.map(|sums| sums.count[row]).filter(|&count| count >= 0)
    }
}

/// A head dimension that elements hold whole.
pub(crate) fn check_dim<T: Element>(head_dim: usize) -> Result<()> {
    if head_dim == 0 || !head_dim.is_multiple_of(T::CHANNELS) {
        let what = if T::CHANNELS == 1 { "positive" } else { "even, for codes of 4 bits" };
        return Err(Error::new(format!("head_dim must be {what}, got {head_dim}")));
    }
    Ok(())
}

/// What one query sees of a row: the entries of two spans, the second never before the end of the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Visible {
    pub sinks: Span,
    pub tail: Span,
}

/// A half-open range of entries of a row. (`Range` is not `Copy`.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Span {
    pub begin: usize,
    pub end: usize,
}

impl Span {
    pub fn new(begin: usize, end: usize) -> Self {
        Self { begin, end: end.max(begin) }
    }

    pub fn len(self) -> usize {
        self.end - self.begin
    }

    pub fn is_empty(self) -> bool {
        self.end == self.begin
    }

    /// The smallest span that holds both.
    pub fn cover(self, other: Self) -> Self {
        match (self.is_empty(), other.is_empty()) {
            (true, _) => other,
            (_, true) => self,
            _ => Self::new(self.begin.min(other.begin), self.end.max(other.end)),
        }
    }

    pub fn intersect(self, other: Self) -> Self {
        Self::new(self.begin.max(other.begin), self.end.min(other.end))
    }
}

impl Visible {
    /// Only entries before `end`.
    pub fn until(self, end: usize) -> Visible {
        let cut = |span: Span| span.intersect(Span::new(0, end));
        Visible { sinks: cut(self.sinks), tail: cut(self.tail) }
    }

    /// The visible entries for a query at `position`, and the number of entries that it may see but for the row's own
    /// window (they are the first ones, since positions increase).
    pub fn new(
        positions: &[i32],
        position: i64,
        sliding_window: Option<i64>,
        sinks: i64,
        recent: i64,
    ) -> (Visible, usize) {
        let eligible = entries_before(positions, position.saturating_add(1));
        let oldest = sliding_window.map_or(0, |window| {
            entries_before(positions, position.saturating_sub(window).saturating_add(1)).min(eligible)
        });
        if recent == 0 {
            let tail = Span::new(oldest, eligible);
            return (Visible { sinks: Span::default(), tail }, eligible);
        }
        let sinks = clamp(sinks, eligible);
        let window = (eligible - clamp(recent, eligible)).max(sinks);
        let visible =
            Visible { sinks: Span::new(oldest, sinks), tail: Span::new(oldest.max(window), eligible) };
        (visible, eligible)
    }
}

/// How many entries stand before `position` in the text.
fn entries_before(positions: &[i32], position: i64) -> usize {
    match positions.last() {
        // The usual case in decoding, without the cache misses of a search.
        Some(&last) if i64::from(last) < position => positions.len(),
        _ => positions.partition_point(|&p| i64::from(p) < position),
    }
}

fn clamp(x: i64, limit: usize) -> usize {
    usize::try_from(x).unwrap_or(usize::MAX).min(limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn visible_entries_are_those_of_the_definition(
            steps in prop::collection::vec(1i32..4, 0..40),
            position in -2i64..130,
            window in prop::option::of(1i64..60),
            sinks in 0i64..12,
            recent in 0i64..12,
        ) {
            let positions: Vec<i32> = steps.iter().scan(-1, |p, step| { *p += step; Some(*p) }).collect();
            let (found, eligible) = Visible::new(&positions, position, window, sinks, recent);
            let may_see = |j: usize| i64::from(positions[j]) <= position;
            prop_assert_eq!(eligible, (0..positions.len()).filter(|&j| may_see(j)).count());
            for (j, &entry) in positions.iter().enumerate() {
                let mut wanted = may_see(j) && window.is_none_or(|w| position - i64::from(entry) < w);
                if recent > 0 {
                    wanted &= (j as i64) < sinks || (j as i64) > eligible as i64 - 1 - recent;
                }
                let inside = |span: Span| usize::from(span.begin <= j && j < span.end);
                prop_assert_eq!(inside(found.sinks) + inside(found.tail), usize::from(wanted));
            }
        }
    }

    #[test]
    fn rows_outside_the_pools_are_refused() {
        for (start, length, capacity) in
            [(-1, 0, 1), (0, 3, 2), (0, -1, 2), (9, 1, 2), (i64::MAX, 0, 1), (0, 0, -1), (11, 0, 0)]
        {
            let rows = Rows { start: &[start], length: &[length], capacity: &[capacity] };
            assert!(rows.check(10).is_err(), "{start} {length} {capacity}");
        }
        let rows = Rows { start: &[10, 8], length: &[0, 2], capacity: &[0, 2] };
        assert!(rows.check(10).is_ok());
        let overlapping = Rows { start: &[5, 0], length: &[1, 1], capacity: &[2, 6] };
        assert!(overlapping.check(10).is_ok() && overlapping.disjoint_order().is_err());
    }
}
