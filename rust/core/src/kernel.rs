//! The one loop that reads keys and values: scores of four queries against a block of entries, online softmax, weighted
//! sum of values. Written once over [`Simd`], compiled for each instruction set.

use crate::element::Element;
use crate::layer::{Span, Visible};
use crate::math;
use crate::products::{Ahead, FloatProducts, Products};
use crate::quantised::{Floats, Side};
use crate::scratch;
#[cfg(target_arch = "aarch64")]
use crate::simd::neon::Neon;
use crate::simd::{Isa, MAX_LANES, Simd, portable::Portable};
#[cfg(target_arch = "x86_64")]
use crate::simd::{avx2::Avx2, avx512::Avx512};
#[cfg(target_arch = "x86_64")]
use crate::whole::WholeProducts;

/// Queries that the inner loops treat at a time.
pub(crate) const LANE_QUERIES: usize = 4;
/// Most entries between two softmax updates.
pub(crate) const BLOCK: usize = 64;
/// Bytes of the keys between two softmax updates, if 16 entries take no more. While the keys of a block are multiplied its
/// values are fetched, and while the values are summed the keys of the next block, line by line: memory never rests. All
/// three together fit any first-level cache.
const BLOCK_BYTES: usize = 8 << 10;

/// Logits of a block, then weights: `[entry][query]`.
pub(crate) type Weights = [f32; BLOCK * LANE_QUERIES];

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
    pub scales: Option<Floats<'a>>,
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
            Isa::Avx512Vnni => run_avx512_vnni(task, states, sums),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => run_avx512(task, states, sums),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => run_avx2(task, states, sums),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                run_with::<Neon, K, V, _>(task, &FloatProducts::<Neon, 4, 4>::new(task), states, sums)
            }
            _ => {
                run_with::<Portable, K, V, _>(task, &FloatProducts::<Portable, 2, 1>::new(task), states, sums)
            }
        }
    }
}

/// # Safety
/// As [`run_with`], on a CPU with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn run_avx512<K: Element, V: Element>(task: &Task<K, V>, states: &mut [State], sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match WholeProducts::<Avx512, 4>::new(task) {
            Some(products) => run_with::<Avx512, K, V, _>(task, &products, states, sums),
            None => {
                run_with::<Avx512, K, V, _>(task, &FloatProducts::<Avx512, 4, 4>::new(task), states, sums)
            }
        }
    }
}

/// # Safety
/// As [`run_with`], on a CPU with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
unsafe fn run_avx512_vnni<K: Element, V: Element>(task: &Task<K, V>, states: &mut [State], sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match WholeProducts::<Avx512<true>, 4>::new(task) {
            Some(products) => run_with::<Avx512<true>, K, V, _>(task, &products, states, sums),
            None => run_avx512(task, states, sums),
        }
    }
}

/// # Safety
/// As [`run_with`], on a CPU with these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Element, V: Element>(task: &Task<K, V>, states: &mut [State], sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match WholeProducts::<Avx2, 2>::new(task) {
            Some(products) => run_with::<Avx2, K, V, _>(task, &products, states, sums),
            None => run_with::<Avx2, K, V, _>(task, &FloatProducts::<Avx2, 2, 2>::new(task), states, sums),
        }
    }
}

/// # Safety
/// The CPU has the features of `S`, and the slices of the task have the lengths that [`run`] asserts.
#[inline(always)]
unsafe fn run_with<S: Simd, K: Element, V: Element, P: Products<K, V>>(
    task: &Task<K, V>,
    products: &P,
    states: &mut [State],
    sums: &mut [f32],
) {
    let dim = task.head_dim;
    let (key_len, value_len) = (dim / K::CHANNELS, dim / V::CHANNELS);
    let sum_width = scratch::width::<V>(dim);
    let entry_bytes = (key_len * size_of::<K>()).max(value_len * size_of::<V>());
    let entries = 1 << (BLOCK_BYTES / entry_bytes).clamp(16, BLOCK).ilog2();
    let mut weights: Weights = [0.0; BLOCK * LANE_QUERIES];
    for span in task.spans {
        let mut begin = span.begin;
        while begin < span.end {
            let block = Span::new(begin, span.end.min(begin + entries));
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
                    let sums = sums.as_mut_ptr().add(group * LANE_QUERIES * sum_width);
                    let keys = task.keys.as_ptr().add(block.begin * key_len);
                    let values = task.values.as_ptr().add(block.begin * value_len);
                    products.logits(group, keys, Ahead(values), block.len(), &mut weights);
                    if let Some(scales) = &task.scales {
                        scale::<S>(&mut weights, scales, block, Side::Key);
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
                        scale::<S>(&mut weights, scales, block, Side::Value);
                    }
                    let next = Ahead(keys.wrapping_add(block.len() * key_len));
                    products.add_values(&weights, values, next, block.len(), sums);
                }
            }
        }
    }
}

/// Multiplies what belongs to an entry of the block by one of its scales.
///
/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn scale<S: Simd>(weights: &mut Weights, scales: &Floats, block: Span, side: Side) {
    let mut steps = [0.0f32; BLOCK];
    scales.copy_to(block.begin, side, &mut steps[..block.len()]);
    for entry in (0..block.len()).step_by(S::LANES / LANE_QUERIES) {
        // SAFETY: BLOCK is a multiple of the entries of a vector; steps behind the last entry are 0.
        unsafe {
            let at = weights.as_mut_ptr().add(entry * LANE_QUERIES);
            S::store(at, S::mul(S::load(at), S::four_times(steps.as_ptr().add(entry))));
        }
    }
}

/// Hides the entries of the block that a query does not see.
fn mask(weights: &mut Weights, block: Span, visible: &[Visible]) {
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
unsafe fn softmax<S: Simd>(weights: &mut Weights, n: usize, state: &mut State, sums: *mut f32, width: usize) {
    let used = n * LANE_QUERIES;
    let whole = used.next_multiple_of(S::LANES);
    weights[used..whole].fill(f32::NEG_INFINITY);
    let weights = weights.as_mut_ptr();
    // SAFETY: whole <= BLOCK * 4, a multiple of LANES; LANES <= MAX_LANES; width is a multiple of LANES.
    unsafe {
        // Two at a time, as each waits for the one before.
        let mut largest = [S::splat(f32::NEG_INFINITY); 2];
        for at in (0..whole).step_by(S::LANES) {
            let [one, other] = largest;
            largest = [other, S::max(one, S::load(weights.add(at)))];
        }
        let mut lanes = [0.0f32; MAX_LANES];
        S::store(lanes.as_mut_ptr(), S::max(largest[0], largest[1]));
        let mut top = S::repeat(&state.top);
        for four in lanes[..S::LANES].as_chunks().0 {
            top = S::max(S::repeat(four), top);
        }
        S::store(lanes.as_mut_ptr(), top);
        for (query, &top) in lanes[..LANE_QUERIES].iter().enumerate() {
            if top > state.top[query] {
                let shrink = (state.top[query] - top).exp();
                state.top[query] = top;
                state.sum[query] *= shrink;
                for column in (0..width).step_by(S::LANES) {
                    let at = sums.add(query * width + column);
                    S::store(at, S::mul(S::load(at), S::splat(shrink)));
                }
            }
        }
        // Where nothing was seen yet, 0 instead of the difference of two infinities.
        let base = S::zero_below(top, S::splat(f32::MIN), top);
        let mut total = S::splat(0.0);
        for at in (0..whole).step_by(S::LANES) {
            let weight = math::exp::<S>(S::sub(S::load(weights.add(at)), base));
            S::store(weights.add(at), weight);
            total = S::add(total, weight);
        }
        S::store(lanes.as_mut_ptr(), total);
        for (lane, total) in lanes[..S::LANES].iter().enumerate() {
            state.sum[lane % LANE_QUERIES] += total;
        }
    }
}
