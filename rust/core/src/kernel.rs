//! The one loop that reads keys and values: scores of four queries against a block of entries, online softmax, weighted
//! sum of values. Written once over [`Simd`], compiled for each instruction set.

use crate::element::Element;
use crate::layer::{Span, Visible};
use crate::math;
use crate::quantised::{Scales, Side};
#[cfg(target_arch = "aarch64")]
use crate::simd::neon::Neon;
use crate::simd::{Isa, MAX_LANES, Simd, portable::Portable, prefetch};
#[cfg(target_arch = "x86_64")]
use crate::simd::{avx2::Avx2, avx512::Avx512};

/// Queries that the inner loops treat at a time.
pub(crate) const LANE_QUERIES: usize = 4;
/// Entries between two softmax updates. While the keys of a block are multiplied its values are fetched, and while the
/// values are summed the keys of the next block: memory never rests. Small enough for both to fit the first-level cache.
const BLOCK: usize = 32;

/// Bytes of a cache line.
const LINE: usize = 64;

/// `D` rounded up to whole vectors of any instruction set.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(MAX_LANES)
}

/// The softmax of four queries so far, over the entries read so far.
#[derive(Clone, Copy)]
pub(crate) struct State {
    /// Largest logit, `-inf` before the first visible entry.
    pub top: [f32; LANE_QUERIES],
    /// Sum of `e^(logit - top)`.
    pub sum: [f32; LANE_QUERIES],
}

impl State {
    pub const EMPTY: State = State { top: [f32::NEG_INFINITY; LANE_QUERIES], sum: [0.0; LANE_QUERIES] };
}

/// A piece of work: the queries of a tile against spans of one row.
pub(crate) struct Task<'a, T> {
    pub head_dim: usize,
    /// Entries of the row, `[length, D]` each.
    pub keys: &'a [T],
    pub values: &'a [T],
    /// Of the row's entries, where keys and values are codes.
    pub scales: Option<Scales<'a>>,
    pub spans: [Span; 2],
    /// Scaled queries, `[count rounded up to 4, padded(D)]`, zeros where there is none.
    pub queries: &'a [f32],
    /// What each of them sees, `[count rounded up to 4]`.
    pub visible: &'a [Visible],
    pub softcap: Option<f32>,
}

/// Runs a task: updates `states` `[count / 4]` and the weighted sums `sums` `[count rounded up to 4, padded(D)]`.
///
/// # Panics
/// When a slice is too short for the task or the CPU lacks `isa`.
pub(crate) fn run<T: Element>(isa: Isa, task: &Task<T>, states: &mut [State], sums: &mut [f32]) {
    let (groups, width) = (states.len(), padded(task.head_dim));
    assert!(isa.is_available());
    assert_eq!(task.queries.len(), groups * LANE_QUERIES * width);
    assert_eq!(task.visible.len(), groups * LANE_QUERIES);
    assert_eq!(sums.len(), task.queries.len());
    for span in task.spans {
        assert!(span.begin <= span.end && span.end * task.head_dim <= task.keys.len().min(task.values.len()));
        assert!(task.scales.is_none_or(|scales| 2 * span.end <= scales.len()));
    }
    // SAFETY: the CPU has the instruction set, and the slices have the lengths that `run_with` relies on.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => run_avx512(task, states, sums),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => run_avx2(task, states, sums),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => run_with::<Neon, T, 4, 4>(task, states, sums),
            _ => run_with::<Portable, T, 1, 1>(task, states, sums),
        }
    }
}

/// # Safety
/// As [`run_with`], on a CPU with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn run_avx512<T: Element>(task: &Task<T>, states: &mut [State], sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { run_with::<Avx512, T, 2, 4>(task, states, sums) }
}

/// # Safety
/// As [`run_with`], on a CPU with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<T: Element>(task: &Task<T>, states: &mut [State], sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { run_with::<Avx2, T, 2, 2>(task, states, sums) }
}

/// `KEYS` keys, and `COLUMNS` vectors of values, are held in registers at a time, each for four queries.
///
/// # Safety
/// The CPU has the features of `S`, and the slices of the task have the lengths that [`run`] asserts.
#[inline(always)]
unsafe fn run_with<S: Simd, T: Element, const KEYS: usize, const COLUMNS: usize>(
    task: &Task<T>,
    states: &mut [State],
    sums: &mut [f32],
) {
    let (dim, width) = (task.head_dim, padded(task.head_dim));
    let mut weights = [0.0f32; BLOCK * LANE_QUERIES];
    for span in task.spans {
        let mut begin = span.begin;
        while begin < span.end {
            let block = Span::new(begin, span.end.min(begin + BLOCK));
            begin = block.end;
            for (group, state) in states.iter_mut().enumerate() {
                let visible: &[Visible] = &task.visible[group * LANE_QUERIES..][..LANE_QUERIES];
                let whole =
                    |v: &Visible| v.tail.intersect(block) == block || v.sinks.intersect(block) == block;
                let masked = !visible.iter().all(whole);
                let none =
                    |v: &Visible| v.tail.intersect(block).is_empty() && v.sinks.intersect(block).is_empty();
                if masked && visible.iter().all(none) {
                    continue;
                }
                // SAFETY: the spans end within keys and values, and the queries hold four rows for each group.
                unsafe {
                    let queries = task.queries.as_ptr().add(group * LANE_QUERIES * width);
                    let sums = sums.as_mut_ptr().add(group * LANE_QUERIES * width);
                    let keys = task.keys.as_ptr().add(block.begin * dim);
                    let values = task.values.as_ptr().add(block.begin * dim);
                    // The first queries of a tile bring the block into the cache for the others.
                    let fetch = group == 0;
                    let ahead = fetch.then_some(values);
                    scores::<S, T, KEYS>(queries, width, keys, ahead, dim, block.len(), &mut weights);
                    if let Some(scales) = &task.scales {
                        scale(&mut weights, scales, block, Side::Key);
                    }
                    if let Some(cap) = task.softcap {
                        for at in (0..block.len() * LANE_QUERIES).step_by(S::LANES) {
                            let logits = weights.as_mut_ptr().add(at);
                            S::store(logits, math::softcap::<S>(S::load(logits), cap));
                        }
                    }
                    if masked {
                        mask(&mut weights, block, visible);
                    }
                    softmax::<S>(&mut weights, block.len(), state, sums, width);
                    if let Some(scales) = &task.scales {
                        scale(&mut weights, scales, block, Side::Value);
                    }
                    let ahead = fetch.then_some(keys.wrapping_add(block.len() * dim));
                    weighted_sum::<S, T, COLUMNS>(&weights, values, ahead, dim, block.len(), sums, width);
                }
            }
        }
    }
}

/// Logits of four queries against `n` keys, to `weights[entry * 4 + query]`; fetches `[n, dim]` at `ahead` meanwhile.
///
/// # Safety
/// `queries` holds `[4, width]`, `keys` `[n, dim]`; `n <= BLOCK`.
#[inline(always)]
unsafe fn scores<S: Simd, T: Element, const KEYS: usize>(
    queries: *const f32,
    width: usize,
    keys: *const T,
    ahead: Option<*const T>,
    dim: usize,
    n: usize,
    weights: &mut [f32; BLOCK * LANE_QUERIES],
) {
    let target = weights.as_mut_ptr();
    let mut entry = 0;
    // SAFETY: entry + KEYS <= n.
    unsafe {
        while entry + KEYS <= n {
            if let Some(ahead) = ahead {
                for column in (0..KEYS * dim).step_by(LINE / size_of::<T>()) {
                    prefetch(ahead.wrapping_add(entry * dim + column));
                }
            }
            dots::<S, T, KEYS>(queries, width, keys.add(entry * dim), dim, target.add(entry * LANE_QUERIES));
            entry += KEYS;
        }
        while entry < n {
            dots::<S, T, 1>(queries, width, keys.add(entry * dim), dim, target.add(entry * LANE_QUERIES));
            entry += 1;
        }
    }
}

/// # Safety
/// `queries` holds `[4, width]`, `keys` `[KEYS, dim]`, `target` `[KEYS, 4]`.
#[inline(always)]
unsafe fn dots<S: Simd, T: Element, const KEYS: usize>(
    queries: *const f32,
    width: usize,
    keys: *const T,
    dim: usize,
    target: *mut f32,
) {
    // SAFETY: columns end at `dim`; the last, partial one is read through a copy.
    unsafe {
        let mut dots = [[S::splat(0.0); LANE_QUERIES]; KEYS];
        let mut column = 0;
        while column + S::LANES <= dim {
            let q: [S::Vector; LANE_QUERIES] = load_rows::<S>(queries.add(column), width);
            for (k, dots) in dots.iter_mut().enumerate() {
                let key = T::load::<S>(keys.add(k * dim + column));
                for (dot, q) in dots.iter_mut().zip(q) {
                    *dot = S::fma(key, q, *dot);
                }
            }
            column += S::LANES;
        }
        if column < dim {
            let q: [S::Vector; LANE_QUERIES] = load_rows::<S>(queries.add(column), width);
            for (k, dots) in dots.iter_mut().enumerate() {
                let key = load_part::<S, T>(keys.add(k * dim + column), dim - column);
                for (dot, q) in dots.iter_mut().zip(q) {
                    *dot = S::fma(key, q, *dot);
                }
            }
        }
        for (k, dots) in dots.into_iter().enumerate() {
            target.add(k * LANE_QUERIES).cast::<[f32; LANE_QUERIES]>().write_unaligned(S::sums(dots));
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

/// A vector of `n < LANES` elements and zeros.
///
/// # Safety
/// `source` is valid for `n` elements.
#[inline(always)]
unsafe fn load_part<S: Simd, T: Element>(source: *const T, n: usize) -> S::Vector {
    let mut part = [T::default(); MAX_LANES];
    // SAFETY: n < LANES <= MAX_LANES.
    unsafe {
        std::ptr::copy_nonoverlapping(source, part.as_mut_ptr(), n);
        T::load::<S>(part.as_ptr())
    }
}

/// Multiplies what belongs to an entry of the block by one of its scales.
#[inline(always)]
fn scale(weights: &mut [f32; BLOCK * LANE_QUERIES], scales: &Scales, block: Span, side: Side) {
    let mut steps = [0.0f32; BLOCK];
    scales.copy_to(block.begin, side, &mut steps[..block.len()]);
    for (weights, step) in weights.as_chunks_mut::<LANE_QUERIES>().0.iter_mut().zip(steps) {
        for weight in weights {
            *weight *= step;
        }
    }
}

/// Hides the entries of the block that a query does not see.
fn mask(weights: &mut [f32; BLOCK * LANE_QUERIES], block: Span, visible: &[Visible]) {
    for (query, seen) in visible.iter().enumerate() {
        let (sinks, tail) = (seen.sinks.intersect(block), seen.tail.intersect(block));
        for entry in block.begin..block.end {
            let inside = |span: Span| span.begin <= entry && entry < span.end;
            if !inside(sinks) && !inside(tail) {
                weights[(entry - block.begin) * LANE_QUERIES + query] = f32::NEG_INFINITY;
            }
        }
    }
}

/// Turns logits into weights `e^(logit - top)`, where `top` may grow: sums so far are then scaled down.
///
/// # Safety
/// `sums` holds `[4, width]`; `n <= BLOCK`.
#[inline(always)]
unsafe fn softmax<S: Simd>(
    weights: &mut [f32; BLOCK * LANE_QUERIES],
    n: usize,
    state: &mut State,
    sums: *mut f32,
    width: usize,
) {
    let used = n * LANE_QUERIES;
    let whole = used.next_multiple_of(S::LANES);
    weights[used..whole].fill(f32::NEG_INFINITY);
    let weights = weights.as_mut_ptr();
    // SAFETY: whole <= BLOCK * 4, a multiple of LANES; LANES <= MAX_LANES; width is a multiple of LANES.
    unsafe {
        let mut largest = S::splat(f32::NEG_INFINITY);
        for at in (0..whole).step_by(S::LANES) {
            largest = S::max(largest, S::load(weights.add(at)));
        }
        let mut lanes = [f32::NEG_INFINITY; MAX_LANES];
        S::store(lanes.as_mut_ptr(), largest);
        let mut base = [0.0; MAX_LANES];
        for query in 0..LANE_QUERIES {
            let top =
                (query..S::LANES).step_by(LANE_QUERIES).fold(state.top[query], |top, at| top.max(lanes[at]));
            if top > state.top[query] {
                let shrink = (state.top[query] - top).exp();
                state.top[query] = top;
                state.sum[query] *= shrink;
                for column in (0..width).step_by(S::LANES) {
                    let at = sums.add(query * width + column);
                    S::store(at, S::mul(S::load(at), S::splat(shrink)));
                }
            }
            if top > f32::NEG_INFINITY {
                base.iter_mut().skip(query).step_by(LANE_QUERIES).for_each(|lane| *lane = top);
            }
        }
        let base = S::load(base.as_ptr());
        let mut total = S::splat(0.0);
        for at in (0..whole).step_by(S::LANES) {
            let weight = math::exp::<S>(S::sub(S::load(weights.add(at)), base));
            S::store(weights.add(at), weight);
            total = S::add(total, weight);
        }
        let mut lanes = [0.0f32; MAX_LANES];
        S::store(lanes.as_mut_ptr(), total);
        for query in 0..LANE_QUERIES {
            state.sum[query] += (query..S::LANES).step_by(LANE_QUERIES).map(|at| lanes[at]).sum::<f32>();
        }
    }
}

/// Adds the weighted values of a block to the sums of four queries; fetches `[n, dim]` at `ahead` meanwhile.
///
/// # Safety
/// `values` holds `[n, dim]`, `sums` `[4, width]`, weights `[n, 4]`.
#[inline(always)]
unsafe fn weighted_sum<S: Simd, T: Element, const COLUMNS: usize>(
    weights: &[f32; BLOCK * LANE_QUERIES],
    values: *const T,
    ahead: Option<*const T>,
    dim: usize,
    n: usize,
    sums: *mut f32,
    width: usize,
) {
    let mut column = 0;
    // SAFETY: columns end at `dim`; the last, partial one is read through a copy and the sums are padded.
    unsafe {
        while column + COLUMNS * S::LANES <= dim {
            columns::<S, COLUMNS>(weights, n, sums.add(column), width, |entry, c| {
                let at = entry * dim + column + c * S::LANES;
                if let Some(ahead) = ahead
                    && ((column + c * S::LANES) * size_of::<T>()).is_multiple_of(LINE)
                {
                    prefetch(ahead.wrapping_add(at));
                }
                T::load::<S>(values.add(at))
            });
            column += COLUMNS * S::LANES;
        }
        while column + S::LANES <= dim {
            columns::<S, 1>(weights, n, sums.add(column), width, |entry, _| {
                T::load::<S>(values.add(entry * dim + column))
            });
            column += S::LANES;
        }
        if column < dim {
            columns::<S, 1>(weights, n, sums.add(column), width, |entry, _| {
                load_part::<S, T>(values.add(entry * dim + column), dim - column)
            });
        }
    }
}

/// # Safety
/// `sums` holds four rows, `width` apart, of `COLUMNS` vectors; `value` may be called for entries below `n`.
#[inline(always)]
unsafe fn columns<S: Simd, const COLUMNS: usize>(
    weights: &[f32; BLOCK * LANE_QUERIES],
    n: usize,
    sums: *mut f32,
    width: usize,
    value: impl Fn(usize, usize) -> S::Vector,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut parts = [[S::splat(0.0); COLUMNS]; LANE_QUERIES];
        for entry in 0..n {
            let mut vectors = [S::splat(0.0); COLUMNS];
            for (c, vector) in vectors.iter_mut().enumerate() {
                *vector = value(entry, c);
            }
            for (query, part) in parts.iter_mut().enumerate() {
                let weight = S::splat(*weights.get_unchecked(entry * LANE_QUERIES + query));
                for (part, vector) in part.iter_mut().zip(vectors) {
                    *part = S::fma(weight, vector, *part);
                }
            }
        }
        for (query, part) in parts.into_iter().enumerate() {
            for (c, part) in part.into_iter().enumerate() {
                let at = sums.add(query * width + c * S::LANES);
                S::store(at, S::add(S::load(at), part));
            }
        }
    }
}
