//! Products of four queries with keys, and of weights with values, several entries or vectors at a time, as many as the
//! registers hold sums.

use std::marker::PhantomData;

use crate::element::Element;
use crate::kernel::{BLOCK, LANE_QUERIES, Task, Weights};
use crate::scratch;
use crate::simd::{MAX_LANES, Simd, prefetch};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Entries that will be read next, fetched while others are multiplied.
pub(crate) struct Ahead<T>(pub *const T);

impl<T: Element> Ahead<T> {
    /// Fetches what the next `channels` take.
    #[inline(always)]
    pub(crate) fn fetch(&mut self, channels: usize) {
        let elements = channels / T::CHANNELS;
        for at in (0..elements * size_of::<T>()).step_by(LINE) {
            prefetch(self.0.cast::<u8>().wrapping_add(at));
        }
        self.0 = self.0.wrapping_add(elements);
    }
}

/// The two products of attention, of a task's queries with a block of its entries.
pub(crate) trait Products<K, V> {
    /// Logits of the queries of a group against `n` keys, to `weights`, and something behind them.
    ///
    /// # Safety
    /// The CPU has the features of the instruction set; `keys` holds `[n, dim / CHANNELS]`; `0 < n <= BLOCK`.
    unsafe fn logits(&self, group: usize, keys: *const K, ahead: Ahead<V>, n: usize, weights: &mut Weights);

    /// Adds the weighted values to the sums of four queries.
    ///
    /// # Safety
    /// The same; `values` holds `[n, dim / CHANNELS]`, `sums` `[4, width]`.
    unsafe fn add_values(
        &self,
        weights: &Weights,
        values: *const V,
        ahead: Ahead<K>,
        n: usize,
        sums: *mut f32,
    );
}

/// In float32, whatever is stored. `KEYS` keys, and `COLUMNS` vectors of values, are held in registers at a time, each for four
/// queries.
pub(crate) struct FloatProducts<'a, S, const KEYS: usize, const COLUMNS: usize> {
    dim: usize,
    /// `[count, width]`
    queries: &'a [f32],
    simd: PhantomData<S>,
}

impl<'a, S, const KEYS: usize, const COLUMNS: usize> FloatProducts<'a, S, KEYS, COLUMNS> {
    pub(crate) fn new<K, V>(task: &Task<'a, K, V>) -> Self {
        Self { dim: task.head_dim, queries: task.queries, simd: PhantomData }
    }
}

impl<S: Simd, K: Element, V: Element, const KEYS: usize, const COLUMNS: usize> Products<K, V>
    for FloatProducts<'_, S, KEYS, COLUMNS>
{
    #[inline(always)]
    unsafe fn logits(
        &self,
        group: usize,
        keys: *const K,
        mut ahead: Ahead<V>,
        n: usize,
        weights: &mut Weights,
    ) {
        const { assert!(BLOCK.is_multiple_of(KEYS) && (KEYS * LANE_QUERIES).is_multiple_of(S::LANES)) }
        let elements = self.dim / K::CHANNELS;
        // SAFETY: the task holds four queries for each group; no entry behind the last one is read, and BLOCK is a multiple of
        // KEYS.
        unsafe {
            let queries = self.queries.as_ptr().add(group * LANE_QUERIES * scratch::width::<K>(self.dim));
            for entry in (0..n).step_by(KEYS) {
                let keys = std::array::from_fn(|k| keys.add((entry + k).min(n - 1) * elements));
                let target = weights.as_mut_ptr().add(entry * LANE_QUERIES);
                if elements.is_multiple_of(S::LANES) {
                    dots::<S, K, V, KEYS, true>(queries, keys, &mut ahead, self.dim, target);
                } else {
                    dots::<S, K, V, KEYS, false>(queries, keys, &mut ahead, self.dim, target);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add_values(
        &self,
        weights: &Weights,
        values: *const V,
        mut ahead: Ahead<K>,
        n: usize,
        sums: *mut f32,
    ) {
        let elements = self.dim / V::CHANNELS;
        let (run, width) = (scratch::run::<V>(self.dim), scratch::width::<V>(self.dim));
        let weights = &weights.as_chunks::<LANE_QUERIES>().0[..n];
        // Elements whose channels fill as many vectors.
        let many = COLUMNS / V::CHANNELS * S::LANES;
        let mut column = 0;
        // SAFETY: columns end at `elements`; the last, partial one is read through a copy and the sums are padded.
        unsafe {
            while many > 0 && column + many <= elements {
                let at = |c: usize| (c % V::CHANNELS, c / V::CHANNELS * S::LANES);
                let value = |values: *const V, c| V::load::<S>(values.add(at(c).1), at(c).0);
                let sum = |c| sums.add(column + at(c).0 * run + at(c).1);
                columns::<S, V, K, COLUMNS>(
                    weights,
                    values.add(column),
                    elements,
                    &mut ahead,
                    sum,
                    width,
                    value,
                );
                column += many;
            }
            while column < elements {
                let rest = elements - column;
                for which in 0..V::CHANNELS {
                    let (values, sum) = (values.add(column), |_| sums.add(which * run + column));
                    if rest >= S::LANES {
                        let value = |values, _| V::load::<S>(values, which);
                        columns::<S, V, K, 1>(weights, values, elements, &mut ahead, sum, width, value);
                    } else {
                        let value = |values, _| load_part::<S, V>(values, rest, which);
                        columns::<S, V, K, 1>(weights, values, elements, &mut ahead, sum, width, value);
                    }
                }
                column += S::LANES;
            }
        }
    }
}

/// With `WHOLE` the vectors of a key end with it; without, the last one is read through a copy. Apart, as together they would
/// need more registers than there are.
///
/// # Safety
/// `queries` holds `[4, width]`, zeros in its padding, each of `keys` `[dim / CHANNELS]`, `target` `[KEYS, 4]`.
#[inline(always)]
unsafe fn dots<S: Simd, T: Element, Next: Element, const KEYS: usize, const WHOLE: bool>(
    queries: *const f32,
    keys: [*const T; KEYS],
    ahead: &mut Ahead<Next>,
    dim: usize,
    target: *mut f32,
) {
    let elements = dim / T::CHANNELS;
    // SAFETY: columns end at `elements`; KEYS * 4 is a multiple of LANES.
    unsafe {
        let mut dots = [[S::splat(0.0); LANE_QUERIES]; KEYS];
        let mut column = 0;
        while column + S::LANES <= elements {
            ahead.fetch(KEYS * T::CHANNELS * S::LANES);
            let load = |key: *const T, which| T::load::<S>(key.add(column), which);
            add_products::<S, T, KEYS>(&mut dots, queries.add(column), keys, dim, load);
            column += S::LANES;
        }
        if !WHOLE && column < elements {
            ahead.fetch(KEYS * T::CHANNELS * S::LANES);
            let load = |key: *const T, which| load_part::<S, T>(key.add(column), elements - column, which);
            add_products::<S, T, KEYS>(&mut dots, queries.add(column), keys, dim, load);
        }
        for (i, dots) in dots.as_flattened().chunks_exact(S::LANES).enumerate() {
            S::store(target.add(i * S::LANES), S::sums(dots));
        }
    }
}

/// Adds the products of one column, a vector of each channel, to the `dots` of keys and queries.
///
/// # Safety
/// `queries` is at the column in `[4, width]`; `load` may be called with each key and channel.
#[inline(always)]
unsafe fn add_products<S: Simd, T: Element, const KEYS: usize>(
    dots: &mut [[S::Vector; LANE_QUERIES]; KEYS],
    queries: *const f32,
    keys: [*const T; KEYS],
    dim: usize,
    load: impl Fn(*const T, usize) -> S::Vector,
) {
    let (run, width) = (scratch::run::<T>(dim), scratch::width::<T>(dim));
    for which in 0..T::CHANNELS {
        // SAFETY: the caller's promise.
        let q = unsafe { load_rows::<S>(queries.add(which * run), width) };
        for (key, dots) in keys.iter().zip(&mut *dots) {
            let key = load(*key, which);
            for (dot, q) in dots.iter_mut().zip(q) {
                // SAFETY: the CPU has the features of `S`.
                *dot = unsafe { S::fma(key, q, *dot) };
            }
        }
    }
}

/// # Safety
/// `source` holds four rows, `width` apart, of at least `LANES` numbers each.
#[inline(always)]
unsafe fn load_rows<S: Simd>(source: *const f32, width: usize) -> [S::Vector; LANE_QUERIES] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            S::load(source),
            S::load(source.add(width)),
            S::load(source.add(2 * width)),
            S::load(source.add(3 * width)),
        ]
    }
}

/// Channel `which` of `n < LANES` elements and of elements of zeros.
///
/// # Safety
/// `source` is valid for `n` elements.
#[inline(always)]
unsafe fn load_part<S: Simd, T: Element>(source: *const T, n: usize, which: usize) -> S::Vector {
    let mut part = [T::default(); MAX_LANES];
    // SAFETY: n < LANES <= MAX_LANES.
    unsafe {
        std::ptr::copy_nonoverlapping(source, part.as_mut_ptr(), n);
        T::load::<S>(part.as_ptr(), which)
    }
}

/// As many vectors of values at a time, over all entries.
///
/// # Safety
/// `sum(c)` is where four rows of a vector begin, `width` apart; `value` may be called with a pointer to each entry, the
/// first one at `values`, others `elements` apart.
#[inline(always)]
unsafe fn columns<S: Simd, T: Element, Next: Element, const COLUMNS: usize>(
    weights: &[[f32; LANE_QUERIES]],
    mut values: *const T,
    elements: usize,
    ahead: &mut Ahead<Next>,
    sum: impl Fn(usize) -> *mut f32,
    width: usize,
    value: impl Fn(*const T, usize) -> S::Vector,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut parts = [[S::splat(0.0); COLUMNS]; LANE_QUERIES];
        for weights in weights {
            ahead.fetch(COLUMNS * S::LANES);
            let mut vectors = [S::splat(0.0); COLUMNS];
            for (c, vector) in vectors.iter_mut().enumerate() {
                *vector = value(values, c);
            }
            for (weight, part) in weights.iter().zip(&mut parts) {
                let weight = S::splat(*weight);
                for (part, vector) in part.iter_mut().zip(vectors) {
                    *part = S::fma(weight, vector, *part);
                }
            }
            values = values.wrapping_add(elements);
        }
        for (query, part) in parts.into_iter().enumerate() {
            for (c, part) in part.into_iter().enumerate() {
                let at = sum(c).add(query * width);
                S::store(at, S::add(S::load(at), part));
            }
        }
    }
}
