//! A row's newest entries as they came, beside their codes, as headkv/cache/residual.py specifies them.

use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::kernel::{self, LANE_QUERIES, State, Task};
use crate::layer::{Layer, Span, Visible};
use crate::quantised::{Float, Floats, rotate, widen};
use crate::scratch;
use crate::simd::Isa;

/// What rows hold as it came: entry `i` of a row in slot `i % size` of its rings.
#[derive(Clone, Copy)]
pub struct Residual<'a> {
    pub size: usize,
    /// Rotated, `[rows, size, D]`
    pub keys: Floats<'a>,
    pub values: Floats<'a>,
    /// `[rows]`, how many of a row's newest entries
    pub count: &'a [i64],
}

impl Residual<'_> {
    pub(crate) fn check(&self, rows: usize, head_dim: usize) -> Result<()> {
        if self.size == 0 {
            return Err(Error::new("residual_keys must have at least one slot a row, got none"));
        }
        let numbers = rows.checked_mul(self.size).and_then(|slots| slots.checked_mul(head_dim));
        let numbers = numbers.ok_or_else(|| Error::new("residual_keys must fit the address space"))?;
        check_len("residual_keys", self.keys.len(), numbers)?;
        check_len("residual_values", self.values.len(), numbers)?;
        check_len("residual_count", self.count.len(), rows)?;
        match self.count.iter().find(|&&count| count < 0) {
            Some(wrong) => Err(Error::new(format!("residual_count must be at least 0, got {wrong}"))),
            None => Ok(()),
        }
    }
}

/// The newest entries of a row that attention sees as they came; of a windowed row within the window.
pub(crate) fn span<K: Element, V: Element>(layer: &Layer<K, V>, row: usize) -> Span {
    let length = layer.rows.length[row] as usize;
    let count = layer.residual.map_or(0, |held| (held.count[row] as usize).min(held.size));
    let recent = layer.recent[row] as usize;
    let count = if recent > 0 { count.min(recent) } else { count };
    Span::new(length - count.min(length), length)
}

/// Of the queries of a tile, in groups of four: their softmax over the newest entries, and the rotated weighted sums, `scratch`
/// of f32.
pub(crate) struct Newest {
    states: Vec<State>,
    sums: Vec<f32>,
    width: usize,
}

impl Newest {
    /// None without such entries. `queries` `[n, D]` are scaled and rotated, `visible` `[n]` is what they see.
    pub fn attend<K: Element, V: Element>(
        layer: &Layer<K, V>,
        row: usize,
        queries: &[f32],
        visible: &[Visible],
        softcap: Option<f32>,
        isa: Isa,
    ) -> Option<Newest> {
        let (span, held, dim) = (span(layer, row), layer.residual?, layer.head_dim);
        let widened = |rings: Floats| {
            let mut vectors = vec![0.0; span.len() * dim];
            for (entry, vector) in (span.begin..span.end).zip(vectors.chunks_exact_mut(dim)) {
                rings.widen((row * held.size + entry % held.size) * dim, vector);
            }
            vectors
        };
        if span.is_empty() {
            return None;
        }
        let (width, groups) = (scratch::width::<f32>(dim), visible.len().div_ceil(LANE_QUERIES));
        let mut spread = vec![0.0; groups * LANE_QUERIES * width];
        for (query, target) in queries.chunks_exact(dim).zip(spread.chunks_exact_mut(width)) {
            scratch::spread::<f32>(query, target);
        }
        let here = |seen: Span| {
            let both = seen.intersect(span);
            Span::new(both.begin - span.begin, both.end - span.begin)
        };
        let seen = |i: usize| visible[i.min(visible.len() - 1)];
        let seen: Vec<Visible> = (0..groups * LANE_QUERIES)
            .map(|i| Visible { sinks: here(seen(i).sinks), tail: here(seen(i).tail) })
            .collect();
        let (keys, values) = (widened(held.keys), widened(held.values));
        let task = Task {
            head_dim: dim,
            keys: &keys[..],
            values: &values[..],
            scales: None,
            spans: [Span::default(), Span::new(0, span.len())],
            queries: &spread,
            visible: &seen,
            softcap,
        };
        let (mut states, mut sums) = (vec![State::EMPTY; groups], vec![0.0; spread.len()]);
        kernel::run(isa, &task, &mut states, &mut sums);
        Some(Newest { states, sums, width })
    }

    /// Query `i`: its largest logit, the sum of its weights, and its sum of values as `scratch` of f32.
    pub fn part(&self, i: usize) -> (f32, f32, &[f32]) {
        let (state, lane) = (&self.states[i / LANE_QUERIES], i % LANE_QUERIES);
        (state.top[lane], state.sum[lane], &self.sums[i * self.width..][..self.width])
    }
}

/// Holds the newest of T new tokens' vectors: rotated, in the slots of the entries that they become.
///
/// `rings` `[rows, size, D]`, `new` `[rows, T, D]`, `length` `[rows]` of the rows without them, `valid` `[B, T]`.
pub fn hold<T: Float>(
    rings: &mut [T],
    (size, head_dim): (usize, usize),
    new: &[T],
    length: &[i64],
    valid: Option<(usize, &[bool])>,
) -> Result<()> {
    let rows = length.len();
    let steps = new.len().checked_div(rows * head_dim).unwrap_or(0);
    let (batch, valid) = valid.map_or((1, None), |(batch, valid)| (batch, Some(valid)));
    if size == 0 {
        return Err(Error::new("rings must have at least one slot a row, got none"));
    }
    if batch == 0 || !rows.is_multiple_of(batch) {
        return Err(Error::new(format!("rows must be a multiple of batch, got {rows} and {batch}")));
    }
    let numbers = rows.checked_mul(size).and_then(|slots| slots.checked_mul(head_dim));
    let numbers = numbers.ok_or_else(|| Error::new("rings must fit the address space"))?;
    check_len("rings", rings.len(), numbers)?;
    check_len("new", new.len(), rows * steps * head_dim)?;
    if let Some(valid) = valid {
        check_len("valid", valid.len(), batch * steps)?;
    }
    if let Some(wrong) = length.iter().find(|&&length| length < 0) {
        return Err(Error::new(format!("length must be at least 0, got {wrong}")));
    }
    let mut turned = vec![0.0f32; head_dim];
    for row in 0..rows {
        let valid = valid.map(|valid| &valid[row / (rows / batch) * steps..][..steps]);
        let stored: Vec<usize> = (0..steps).filter(|&step| valid.is_none_or(|valid| valid[step])).collect();
        for (number, &step) in stored.iter().enumerate().skip(stored.len().saturating_sub(size)) {
            widen(&new[(row * steps + step) * head_dim..][..head_dim], &mut turned);
            rotate(&mut turned);
            let slot = (length[row] as usize + number) % size;
            let target = &mut rings[(row * size + slot) * head_dim..][..head_dim];
            target.iter_mut().zip(&turned).for_each(|(to, &x)| *to = T::from_f32(x));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_tokens_take_the_slots_of_their_entries() {
        let new: Vec<f32> = (0..10).map(|x| x as f32).collect(); // 2 rows, 5 tokens, D 1
        let mut rings = vec![-1.0f32; 6];
        hold(&mut rings, (3, 1), &new, &[4, 0], None).unwrap();
        assert_eq!(rings, [2.0, 3.0, 4.0, 8.0, 9.0, 7.0]); // entries 6, 7, 8; 3, 4, 2
        let valid = [true, false, true, false, false];
        let mut rings = vec![-1.0f32; 6];
        hold(&mut rings, (3, 1), &new, &[4, 0], Some((1, &valid))).unwrap();
        assert_eq!(rings, [-1.0, 0.0, 2.0, 5.0, 7.0, -1.0]);
        assert!(hold(&mut rings, (0, 1), &new, &[4, 0], None).is_err());
        assert!(hold(&mut rings, (3, 1), &new, &[-4, 0], None).is_err());
        assert!(hold(&mut rings, (2, 1), &new, &[4, 0], None).is_err());
    }
}
