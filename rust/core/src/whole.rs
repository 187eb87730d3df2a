//! The products of `products.rs` where keys and values are codes: products of whole numbers, half as many instructions as those
//! of float32, and each of them exact.
//!
//! A query is n steps, a step the largest of its channels over 32,767, and n a number of 16 bits. So are the weights of a
//! block, each times the scale of its value. What is below half a step counts as 0: a hundredth of what a code is off by.

use std::marker::PhantomData;

use crate::element::{Affine, Element};
use crate::kernel::{BLOCK, LANE_QUERIES, Task, Weights};
use crate::math::ROUND;
use crate::products::{Ahead, Products};
use crate::quantised::Floats;
use crate::scratch;
use crate::simd::{MAX_LANES, Whole};

const MOST_STEPS: f32 = 32_767.0;
/// Numbers below it count as 0, so that a step has an inverse.
const LEAST: f32 = 1e-30;
/// Of so many channels a sum of products with codes of 8 bits fits 32.
const MOST_CHANNELS: usize = 512;

/// Queries as whole numbers; keys are multiplied `KEYS` at a time.
pub(crate) struct WholeProducts<S, const KEYS: usize> {
    dim: usize,
    /// `[count, width]`, as scratch of keys
    numbers: Vec<i16>,
    /// A product is a sum of whole numbers times the first, and the second: `[count / 4][query]` of each.
    steps: Vec<[f32; LANE_QUERIES]>,
    bases: Vec<[f32; LANE_QUERIES]>,
    simd: PhantomData<S>,
}

impl<S: Whole, const KEYS: usize> WholeProducts<S, KEYS> {
    /// None where floats must do: for entries that are no codes; for those of float32, whose user wants more digits; and where
    /// vectors do not end with an entry.
    #[inline(always)]
    pub(crate) fn new<K: Element, V: Element>(task: &Task<K, V>) -> Option<Self> {
        let dim = task.head_dim;
        let short = matches!(task.scales, Some(Floats::Bf16(_) | Floats::F16(_)));
        let ends = |channels: usize| (dim / channels).is_multiple_of(2 * S::LANES);
        let fits = dim <= MOST_CHANNELS && ends(K::CHANNELS) && ends(V::CHANNELS);
        let (Some(code), Some(_)) = (K::CODE, V::CODE) else { return None };
        if !(short && fits) {
            return None;
        }
        let mut numbers = vec![0; task.queries.len()];
        let width = scratch::width::<K>(dim);
        let each = numbers.chunks_exact_mut(width).zip(task.queries.chunks_exact(width));
        let (steps, bases): (Vec<f32>, Vec<f32>) = each
            .map(|(numbers, query)| {
                let largest = query.iter().fold(0.0f32, |top, x| top.max(x.abs()));
                let (step, inverse) = step(largest, query.iter().sum());
                numbers.iter_mut().zip(query).for_each(|(number, x)| *number = whole(x * inverse) as i16);
                let sum: i32 = numbers.iter().map(|&number| i32::from(number)).sum();
                (code.step * step, code.base * step * sum as f32)
            })
            .unzip();
        let fours = |numbers: Vec<f32>| numbers.as_chunks().0.to_vec();
        Some(Self { dim, numbers, steps: fours(steps), bases: fours(bases), simd: PhantomData })
    }
}

/// The step of numbers of which none is larger, and its inverse; no number where their sum is none.
#[inline(always)]
fn step(largest: f32, sum: f32) -> (f32, f32) {
    match largest {
        _ if !sum.is_finite() => (f32::NAN, 0.0),
        ..LEAST => (0.0, 0.0),
        _ => (largest / MOST_STEPS, MOST_STEPS / largest),
    }
}

/// The nearest whole number, in the lower 16 bits.
#[inline(always)]
fn whole(x: f32) -> u32 {
    (x + ROUND).to_bits() & 0xffff
}

impl<S: Whole, K: Element, V: Element, const KEYS: usize> Products<K, V> for WholeProducts<S, KEYS> {
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
        let (run, width) = (scratch::run::<K>(self.dim), scratch::width::<K>(self.dim));
        // SAFETY: no entry behind the last one is read, and BLOCK is a multiple of KEYS; columns end at `elements`.
        unsafe {
            let queries = self.numbers.as_ptr().add(group * LANE_QUERIES * width);
            let (steps, bases) = (S::repeat(&self.steps[group]), S::repeat(&self.bases[group]));
            for entry in (0..n).step_by(KEYS) {
                let keys: [_; KEYS] = std::array::from_fn(|k| keys.add((entry + k).min(n - 1) * elements));
                let mut dots = [[S::none(); LANE_QUERIES]; KEYS];
                for column in (0..elements).step_by(2 * S::LANES) {
                    ahead.fetch(KEYS * K::CHANNELS * 2 * S::LANES);
                    for which in 0..K::CHANNELS {
                        let mut four = [S::none(); LANE_QUERIES];
                        for (i, q) in four.iter_mut().enumerate() {
                            *q = S::load_whole(queries.add(i * width + which * run + column));
                        }
                        for (key, dots) in keys.iter().zip(&mut dots) {
                            let key = K::whole::<S>(S::load_bytes(key.add(column).cast()), which);
                            for (dot, q) in dots.iter_mut().zip(four) {
                                *dot = S::add_products(key, q, *dot);
                            }
                        }
                    }
                }
                let target = weights.as_mut_ptr().add(entry * LANE_QUERIES);
                for (i, dots) in dots.as_flattened().chunks_exact(S::LANES).enumerate() {
                    S::store(target.add(i * S::LANES), S::fma(S::totals(dots), steps, bases));
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
        let mut pairs = [[0; LANE_QUERIES]; BLOCK / 2];
        // SAFETY: no entry behind the last one is read; columns end at `elements`.
        unsafe {
            let steps = whole_pairs::<S>(weights, n, &mut pairs);
            let code = V::CODE.unwrap_or_default();
            let bases = bases(&pairs[..n.div_ceil(2)], code, steps);
            for column in (0..elements).step_by(2 * S::LANES) {
                for which in 0..V::CHANNELS {
                    let mut parts = [[S::none(); 2]; LANE_QUERIES];
                    let mut value = values.add(column);
                    for weights in &pairs[..n / 2] {
                        ahead.fetch(2 * 2 * S::LANES);
                        add_two::<S, V>(&mut parts, weights, [value, value.add(elements)], which);
                        value = value.wrapping_add(2 * elements);
                    }
                    if n % 2 == 1 {
                        // The second one's weight is 0.
                        ahead.fetch(2 * 2 * S::LANES);
                        add_two::<S, V>(&mut parts, &pairs[n / 2], [value; 2], which);
                    }
                    for (query, parts) in parts.into_iter().enumerate() {
                        let (step, base) = (S::splat(code.step * steps[query]), S::splat(bases[query]));
                        for (half, part) in parts.into_iter().enumerate() {
                            let at = sums.add(query * width + which * run + column + half * S::LANES);
                            S::store(at, S::add(S::fma(S::float(part), step, base), S::load(at)));
                        }
                    }
                }
            }
        }
    }
}

/// Adds the weighted channels `which` of two entries to the sums of four queries.
///
/// # Safety
/// The CPU has the features of `S`; `values` are valid for `2 * LANES` bytes.
#[inline(always)]
unsafe fn add_two<S: Whole, V: Element>(
    sums: &mut [[S::Whole; 2]; LANE_QUERIES],
    weights: &[u32; LANE_QUERIES],
    values: [*const V; 2],
    which: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let [first, second] = S::interleave(S::load_bytes(values[0].cast()), S::load_bytes(values[1].cast()));
        let (first, second) = (V::whole::<S>(first, which), V::whole::<S>(second, which));
        for (sums, weights) in sums.iter_mut().zip(weights) {
            let weights = S::splat_pair(*weights);
            sums[0] = S::add_products(weights, first, sums[0]);
            sums[1] = S::add_products(weights, second, sums[1]);
        }
    }
}

/// What codes add to sums whose weights are these, beside steps.
#[inline(always)]
fn bases(pairs: &[[u32; LANE_QUERIES]], code: Affine, steps: [f32; LANE_QUERIES]) -> [f32; LANE_QUERIES] {
    let mut sums = [0u32; LANE_QUERIES];
    if code.base != 0.0 {
        for pair in pairs {
            sums.iter_mut().zip(pair).for_each(|(sum, two)| *sum += (two & 0xffff) + (two >> 16));
        }
    }
    std::array::from_fn(|query| code.base * steps[query] * sums[query] as f32)
}

/// The first `n` entries' weights as whole numbers, of two entries in the halves of 32 bits, the second of which may be
/// missing; and a step for each query.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn whole_pairs<S: Whole>(
    weights: &Weights,
    n: usize,
    pairs: &mut [[u32; LANE_QUERIES]; BLOCK / 2],
) -> [f32; LANE_QUERIES] {
    let (mut largest, mut sums) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
    // SAFETY: the weights end behind the block; behind the last entry they are 0, to a multiple of LANES.
    unsafe {
        let (mut top, mut sum) = (S::splat(0.0), S::splat(0.0));
        for at in (0..n * LANE_QUERIES).step_by(S::LANES) {
            let weights = S::load(weights.as_ptr().add(at));
            (top, sum) = (S::max(top, weights), S::add(sum, weights));
        }
        S::store(largest.as_mut_ptr(), top);
        S::store(sums.as_mut_ptr(), sum);
    }
    let lanes = |query: usize| (query..S::LANES).step_by(LANE_QUERIES);
    let (mut steps, mut inverses) = ([0.0; LANE_QUERIES], [0.0; LANE_QUERIES]);
    for query in 0..LANE_QUERIES {
        let largest = lanes(query).fold(0.0, |top, lane| largest[lane].max(top));
        (steps[query], inverses[query]) = step(largest, lanes(query).map(|lane| sums[lane]).sum());
    }
    let number = |entry: usize, query: usize| whole(weights[entry * LANE_QUERIES + query] * inverses[query]);
    for (pair, numbers) in pairs[..n.div_ceil(2)].iter_mut().enumerate() {
        *numbers = std::array::from_fn(|query| number(2 * pair, query) | number(2 * pair + 1, query) << 16);
    }
    steps
}
