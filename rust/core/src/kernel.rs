//! The one loop that reads keys and values: scores of four queries against a block of entries, online softmax, weighted
//! sum of values. Written once over [`Simd`], compiled for each instruction set.

use crate::element::Element;
use crate::layer::{Span, Visible};
use crate::math;
use crate::quantised::{Scales, Side};
use crate::scratch;
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
pub(crate) struct Task<'a, K, V> {
    pub head_dim: usize,
    /// Entries of the row, `[length, D / CHANNELS]` each.
    pub keys: &'a [K],
    pub values: &'a [V],
    /// Of the row's entries, where keys and values are codes.
    pub scales: Option<Scales<'a>>,
    pub spans: [Span; 2],
    /// Scaled queries as `scratch` of keys, `[count rounded up to 4, width]`, zeros where there is none.
    pub queries: &'a [f32],
    /// What each of them sees, `[count rounded up to 4]`.
    pub visible: &'a [Visible],
    pub softcap: Option<f32>,
}

/// Runs a task: updates `states` `[count / 4]` and the weighted sums `sums` `[count rounded up to 4, width]`, `scratch` of
/// values.
///
/// # Panics
/// When a slice is too short for the task or the CPU lacks `isa`.
pub(crate) fn run<K: Element, V: Element>(
    isa: Isa,
    task: &Task<K, V>,
    states: &mut [State],
    sums: &mut [f32],
) {
    let (count, dim) = (states.len() * LANE_QUERIES, task.head_dim);
    assert!(isa.is_available());
    assert_eq!(task.queries.len(), count * scratch::width::<K>(dim));
    assert_eq!(task.visible.len(), count);
    assert_eq!(sums.len(), count * scratch::width::<V>(dim));
    for span in task.spans {
        let entries = (task.keys.len() / (dim / K::CHANNELS)).min(task.values.len() / (dim / V::CHANNELS));
        assert!(span.begin <= span.end && span.end <= entries);
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
            Isa::Neon => run_with::<Neon, K, V, 4, 4>(task, states, sums),
            _ => run_with::<Portable, K, V, 1, 1>(task, states, sums),
        }
    }
}

/// # Safety
/// As [`run_with`], on a CPU with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn run_avx512<K: Element, V: Element>(task: &Task<K, V>, states: &mut [State], sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { run_with::<Avx512, K, V, 2, 4>(task, states, sums) }
}

/// # Safety
/// As [`run_with`], on a CPU with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Element, V: Element>(task: &Task<K, V>, states: &mut [State], sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { run_with::<Avx2, K, V, 2, 2>(task, states, sums) }
}

/// `KEYS` keys, and `COLUMNS` vectors of values, are held in registers at a time, each for four queries.
///
/// # Safety
/// The CPU has the features of `S`, and the slices of the task have the lengths that [`run`] asserts.
#[inline(always)]
unsafe fn run_with<S: Simd, K: Element, V: Element, const KEYS: usize, const COLUMNS: usize>(
    task: &Task<K, V>,
    states: &mut [State],
    sums: &mut [f32],
) {
    let dim = task.head_dim;
    let (key_len, value_len) = (dim / K::CHANNELS, dim / V::CHANNELS);
    let (query_width, sum_width) = (scratch::width::<K>(dim), scratch::width::<V>(dim));
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
                    let queries = task.queries.as_ptr().add(group * LANE_QUERIES * query_width);
                    let sums = sums.as_mut_ptr().add(group * LANE_QUERIES * sum_width);
                    let keys = task.keys.as_ptr().add(block.begin * key_len);
                    let values = task.values.as_ptr().add(block.begin * value_len);
                    // The first queries of a tile bring the block into the cache for the others.
                    let fetch = group == 0;
                    let ahead = fetch.then(|| Ahead::of(values, value_len));
                    scores::<S, K, KEYS>(queries, keys, ahead, dim, block.len(), &mut weights);
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
                    softmax::<S>(&mut weights, block.len(), state, sums, sum_width);
                    if let Some(scales) = &task.scales {
                        scale(&mut weights, scales, block, Side::Value);
                    }
                    let next = keys.wrapping_add(block.len() * key_len);
                    let ahead = fetch.then(|| Ahead::of(next, key_len));
                    weighted_sum::<S, V, COLUMNS>(&weights, values, ahead, dim, block.len(), sums);
                }
            }
        }
    }
}

/// Entries that will be read next, fetched one by one while others are multiplied.
#[derive(Clone, Copy)]
struct Ahead {
    start: *const u8,
    /// Of an entry.
    bytes: usize,
}

impl Ahead {
    fn of<T>(start: *const T, elements: usize) -> Self {
        Self { start: start.cast(), bytes: elements * size_of::<T>() }
    }

    #[inline(always)]
    fn fetch(self, entry: usize, count: usize) {
        for at in (0..count * self.bytes).step_by(LINE) {
            prefetch(self.start.wrapping_add(entry * self.bytes + at));
        }
    }
}

/// Logits of four queries against `n` keys, to `weights[entry * 4 + query]`; fetches `n` entries `ahead` meanwhile.
///
/// # Safety
/// `queries` holds `[4, width]`, `keys` `[n, dim / CHANNELS]`; `n <= BLOCK`.
#[inline(always)]
unsafe fn scores<S: Simd, T: Element, const KEYS: usize>(
    queries: *const f32,
    keys: *const T,
    ahead: Option<Ahead>,
    dim: usize,
    n: usize,
    weights: &mut [f32; BLOCK * LANE_QUERIES],
) {
    let (target, elements) = (weights.as_mut_ptr(), dim / T::CHANNELS);
    let mut entry = 0;
    // SAFETY: entry + KEYS <= n.
    unsafe {
        while entry + KEYS <= n {
            if let Some(ahead) = ahead {
                ahead.fetch(entry, KEYS);
            }
            dots::<S, T, KEYS>(queries, keys.add(entry * elements), dim, target.add(entry * LANE_QUERIES));
            entry += KEYS;
        }
        while entry < n {
            dots::<S, T, 1>(queries, keys.add(entry * elements), dim, target.add(entry * LANE_QUERIES));
            entry += 1;
        }
    }
}

/// # Safety
/// `queries` holds `[4, width]`, `keys` `[KEYS, dim / CHANNELS]`, `target` `[KEYS, 4]`.
#[inline(always)]
unsafe fn dots<S: Simd, T: Element, const KEYS: usize>(
    queries: *const f32,
    keys: *const T,
    dim: usize,
    target: *mut f32,
) {
    let (elements, run, width) = (dim / T::CHANNELS, scratch::run::<T>(dim), scratch::width::<T>(dim));
    // SAFETY: columns end at `elements`; the last, partial one is read through a copy. Queries are 0 in their padding.
    unsafe {
        let mut dots = [[S::splat(0.0); LANE_QUERIES]; KEYS];
        let mut column = 0;
        while column + S::LANES <= elements {
            for which in 0..T::CHANNELS {
                let q = load_rows::<S>(queries.add(which * run + column), width);
                for (k, dots) in dots.iter_mut().enumerate() {
                    let key = T::load::<S>(keys.add(k * elements + column), which);
                    for (dot, q) in dots.iter_mut().zip(q) {
                        *dot = S::fma(key, q, *dot);
                    }
                }
            }
            column += S::LANES;
        }
        if column < elements {
            for which in 0..T::CHANNELS {
                let q = load_rows::<S>(queries.add(which * run + column), width);
                for (k, dots) in dots.iter_mut().enumerate() {
                    let key = load_part::<S, T>(keys.add(k * elements + column), elements - column, which);
                    for (dot, q) in dots.iter_mut().zip(q) {
                        *dot = S::fma(key, q, *dot);
                    }
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

/// Adds the weighted values of a block to the sums of four queries; fetches `n` entries `ahead` meanwhile.
///
/// # Safety
/// `values` holds `[n, dim / CHANNELS]`, `sums` `[4, width]`, weights `[n, 4]`.
#[inline(always)]
unsafe fn weighted_sum<S: Simd, T: Element, const COLUMNS: usize>(
    weights: &[f32; BLOCK * LANE_QUERIES],
    values: *const T,
    ahead: Option<Ahead>,
    dim: usize,
    n: usize,
    sums: *mut f32,
) {
    let (elements, run, width) = (dim / T::CHANNELS, scratch::run::<T>(dim), scratch::width::<T>(dim));
    // Elements whose channels fill as many vectors.
    let many = COLUMNS / T::CHANNELS * S::LANES;
    let mut column = 0;
    // SAFETY: columns end at `elements`; the last, partial one is read through a copy and the sums are padded.
    unsafe {
        while many > 0 && column + many <= elements {
            let at = |c: usize| (c % T::CHANNELS, column + c / T::CHANNELS * S::LANES);
            columns::<S, COLUMNS>(
                weights,
                n,
                |c| sums.add(at(c).0 * run + at(c).1),
                width,
                |entry, c| {
                    if let Some(ahead) = ahead
                        && column + c == 0
                    {
                        ahead.fetch(entry, 1);
                    }
                    T::load::<S>(values.add(entry * elements + at(c).1), at(c).0)
                },
            );
            column += many;
        }
        while column + S::LANES <= elements {
            for which in 0..T::CHANNELS {
                let value = |entry, _| T::load::<S>(values.add(entry * elements + column), which);
                columns::<S, 1>(weights, n, |_| sums.add(which * run + column), width, value);
            }
            column += S::LANES;
        }
        if column < elements {
            for which in 0..T::CHANNELS {
                let part = |entry, _| {
                    load_part::<S, T>(values.add(entry * elements + column), elements - column, which)
                };
                columns::<S, 1>(weights, n, |_| sums.add(which * run + column), width, part);
            }
        }
    }
}

/// # Safety
/// `sum(c)` is where four rows of a vector begin, `width` apart; `value` may be called for entries below `n`.
#[inline(always)]
unsafe fn columns<S: Simd, const COLUMNS: usize>(
    weights: &[f32; BLOCK * LANE_QUERIES],
    n: usize,
    sum: impl Fn(usize) -> *mut f32,
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
                let at = sum(c).add(query * width);
                S::store(at, S::add(S::load(at), part));
            }
        }
    }
}
