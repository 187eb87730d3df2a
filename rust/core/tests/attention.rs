//! Attention against its definition in f64, for every instruction set of this CPU.

use headkv_core::{
    Code, Element, Float, Floats, Isa, Layer, Options, Queries, Residual, Rows, Sums, attend, bf16, f16,
    quantise,
};
use proptest::prelude::*;

/// Everything that a call needs, owned. Slots that belong to no entry hold not-a-number.
#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    kv_heads: usize,
    group: usize,
    steps: usize,
    dim: usize,
    lengths: Vec<usize>,
    sinks: Vec<i64>,
    recent: Vec<i64>,
    counts: Option<Vec<i64>>,
    window: Option<i64>,
    softcap: Option<f32>,
    /// Whether query heads have sinks: odd ones, the others `-inf`.
    sunk: bool,
    seed: u64,
}

struct Built {
    start: Vec<i64>,
    length: Vec<i64>,
    capacity: Vec<i64>,
    keys: Vec<f32>,
    values: Vec<f32>,
    positions: Vec<i32>,
    key_sum: Vec<f32>,
    value_sum: Vec<f32>,
    queries: Vec<f32>,
    query_positions: Vec<i64>,
    sink_logits: Option<Vec<f32>>,
}

/// A small generator: the tests need numbers, not randomness.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (self.0 >> 40) as f32 / (1u64 << 24) as f32;
        // Numbers that f16 and bf16 hold exactly.
        bf16::from_f32(f16::from_f32(4.0 * uniform - 2.0).to_f32()).to_f32()
    }

    fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }

    fn below(&mut self, n: usize) -> usize {
        ((f64::from(self.next()) + 2.0) / 4.001 * n as f64) as usize
    }
}

impl Case {
    fn rows(&self) -> usize {
        self.batch * self.kv_heads
    }

    fn build(&self) -> Built {
        let mut numbers = Numbers(self.seed);
        let (mut start, mut capacity, mut slots) = (vec![], vec![], 0);
        for &length in &self.lengths {
            slots += numbers.below(3);
            start.push(slots as i64);
            capacity.push((length + numbers.below(4)) as i64);
            slots += capacity[capacity.len() - 1] as usize;
        }
        let mut built = Built {
            keys: vec![f32::NAN; slots * self.dim],
            values: vec![f32::NAN; slots * self.dim],
            positions: vec![i32::MIN; slots],
            length: self.lengths.iter().map(|&n| n as i64).collect(),
            key_sum: numbers.take(self.rows() * self.dim),
            value_sum: numbers.take(self.rows() * self.dim),
            queries: numbers.take(self.rows() * self.group * self.steps * self.dim),
            query_positions: vec![],
            sink_logits: self.sunk.then(|| {
                let sink = |i| if i % 2 == 0 { f32::NEG_INFINITY } else { 20.0 * numbers.next() };
                (0..self.kv_heads * self.group).map(sink).collect()
            }),
            start,
            capacity,
        };
        let mut last = 0;
        for (row, &length) in self.lengths.iter().enumerate() {
            let first = built.start[row] as usize;
            let mut position = -1;
            for slot in first..first + length {
                position += 1 + numbers.below(3) as i32;
                built.positions[slot] = position;
            }
            last = last.max(i64::from(position));
            let elements = first * self.dim..(first + length) * self.dim;
            let n = elements.len();
            built.keys[elements.clone()].copy_from_slice(&numbers.take(n));
            built.values[elements].copy_from_slice(&numbers.take(n));
        }
        for _ in 0..self.batch {
            let back = numbers.below(5) as i64;
            built.query_positions.extend((0..self.steps).map(|t| last - (self.steps - 1 - t) as i64 - back));
        }
        built
    }

    /// The definition, entry by entry. Returns `[B, HQ, T, D]`.
    fn truth(&self, built: &Built, scale: f64) -> Vec<f64> {
        let mut out = vec![];
        for query in 0..self.rows() * self.group * self.steps {
            let (row, step) = (query / (self.group * self.steps), query % self.steps);
            let position = built.query_positions[row / self.kv_heads * self.steps + step];
            let first = built.start[row] as usize;
            let at = |pool: &[f32], slot: usize| -> Vec<f64> {
                pool[slot * self.dim..][..self.dim].iter().map(|&x| f64::from(x)).collect()
            };
            let logit = |key: &[f64]| {
                let q = at(&built.queries, query);
                let logit = q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * scale;
                self.softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
            };
            let eligible: Vec<usize> = (first..first + self.lengths[row])
                .filter(|&slot| i64::from(built.positions[slot]) <= position)
                .collect();
            let (mut entries, mut hidden) = (vec![], vec![]);
            for (j, &slot) in eligible.iter().enumerate() {
                let near = self.window.is_none_or(|w| position - i64::from(built.positions[slot]) < w);
                let last = eligible.len() as i64 - 1;
                let inside = self.recent[row] == 0
                    || (j as i64) < self.sinks[row]
                    || (j as i64) > last - self.recent[row];
                match (near, inside) {
                    (true, true) => entries.push((logit(&at(&built.keys, slot)), at(&built.values, slot))),
                    (_, false) => hidden.push(slot),
                    _ => {}
                }
            }
            let dropped = self.counts.as_ref().map_or(-1, |counts| counts[row]);
            let n = dropped + hidden.len() as i64;
            if dropped >= 0 && n > 0 {
                let mean = |sums: &[f32], pool: &[f32]| {
                    hidden.iter().fold(at(sums, row), |sum, &slot| {
                        sum.iter().zip(at(pool, slot)).map(|(a, b)| a + b).collect()
                    })
                };
                let over = |sum: Vec<f64>| sum.into_iter().map(|x| x / n as f64).collect::<Vec<f64>>();
                let key = over(mean(&built.key_sum, &built.keys));
                let value = over(mean(&built.value_sum, &built.values));
                entries.push((logit(&key) + (n as f64).ln(), value));
            }
            let sink = built.sink_logits.as_ref().map_or(f64::NEG_INFINITY, |sinks| {
                f64::from(sinks[row % self.kv_heads * self.group + query / self.steps % self.group])
            });
            let top = entries.iter().map(|entry| entry.0).fold(sink, f64::max);
            let total = entries.iter().map(|entry| (entry.0 - top).exp()).sum::<f64>() + (sink - top).exp();
            out.extend((0..self.dim).map(|d| {
                let weighted = entries.iter().map(|entry| (entry.0 - top).exp() * entry.1[d]).sum::<f64>();
                if entries.is_empty() { 0.0 } else { weighted / total }
            }));
        }
        out
    }

    fn check<T: Element>(&self, isa: Isa, threads: usize, store: impl Fn(f32) -> T) {
        let built = self.build();
        let keys: Vec<T> = built.keys.iter().map(|&x| store(x)).collect();
        let values: Vec<T> = built.values.iter().map(|&x| store(x)).collect();
        self.check_stored(&built, &keys, &values, None, isa, threads, 2e-5);
    }

    /// Against what the codes stand for, their scales of dtype `T`.
    fn check_codes<T: Float, C: Code>(
        &self,
        isa: Isa,
        threads: usize,
        floats: fn(&[T]) -> Floats,
        within: f64,
    ) {
        let mut built = self.build();
        let mut scales = vec![T::default(); 2 * built.positions.len()];
        let [keys, values] = [&mut built.keys, &mut built.values].map(|pool| {
            let mut codes = vec![C::default(); pool.len() / C::CHANNELS];
            let mut steps = vec![T::default(); pool.len() / self.dim];
            let vectors: Vec<T> = pool.iter().map(|&x| T::from_f32(x)).collect();
            quantise(self.dim, &vectors, &mut codes, &mut steps).unwrap();
            for (slot, vector) in pool.chunks_exact_mut(self.dim).enumerate() {
                for (i, x) in vector.iter_mut().enumerate() {
                    let at = slot * self.dim + i;
                    *x = codes[at / C::CHANNELS].channel(at % C::CHANNELS) * steps[slot].channel(0);
                }
                rotate(vector);
            }
            (codes, steps)
        });
        for (pair, steps) in scales.chunks_exact_mut(2).zip(keys.1.iter().zip(&values.1)) {
            pair.copy_from_slice(&[*steps.0, *steps.1]);
        }
        self.check_stored(&built, &keys.0, &values.0, Some(floats(&scales)), isa, threads, within);
    }

    #[allow(clippy::too_many_arguments)]
    fn check_stored<T: Element>(
        &self,
        built: &Built,
        keys: &[T],
        values: &[T],
        scales: Option<Floats>,
        isa: Isa,
        threads: usize,
        within: f64,
    ) {
        let layer = Layer {
            head_dim: self.dim,
            keys,
            values,
            positions: &built.positions,
            rows: Rows { start: &built.start, length: &built.length, capacity: &built.capacity },
            sinks: &self.sinks,
            recent: &self.recent,
            sums: self.counts.as_ref().map(|count| Sums {
                key: &built.key_sum,
                value: &built.value_sum,
                count,
            }),
            scales,
            residual: None,
        };
        let queries = Queries {
            batch: self.batch,
            heads: self.kv_heads * self.group,
            steps: self.steps,
            data: &built.queries,
            positions: &built.query_positions,
            sink_logits: built.sink_logits.as_deref(),
        };
        let scale = (self.dim as f32).powf(-0.5);
        let options = Options { scale, sliding_window: self.window, softcap: self.softcap, threads, isa };
        let mut out = vec![f32::NAN; built.queries.len()];
        attend(&layer, &queries, &options, &mut out).unwrap();
        for (i, (found, truth)) in out.iter().zip(self.truth(built, f64::from(scale))).enumerate() {
            let error = (f64::from(*found) - truth).abs();
            assert!(error < within, "{isa:?}, element {i}: {found} is not {truth}; {self:?}");
        }
    }
}

/// `x` times the Hadamard matrix of the largest power of two that divides its length.
fn rotate(x: &mut [f32]) {
    let width = 1 << x.len().trailing_zeros();
    for x in x.chunks_exact_mut(width) {
        let mut turned: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for bit in (0..width.trailing_zeros()).map(|bit| 1 << bit) {
            let pair = |i: usize| (turned[i & !bit], turned[i | bit]);
            turned = (0..width)
                .map(|i| if i & bit == 0 { pair(i).0 + pair(i).1 } else { pair(i).0 - pair(i).1 })
                .collect();
        }
        x.iter_mut().zip(turned).for_each(|(x, turned)| *x = (turned / (width as f64).sqrt()) as f32);
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1usize..3, 1usize..4, 1usize..10, prop_oneof![Just(1usize), 1usize..12]);
    let dim = prop_oneof![1usize..140, Just(40usize), Just(64), Just(128), Just(256)];
    let options = (prop::bool::ANY, prop::option::of(1i64..80), prop::option::of(1.0f32..40.0), any::<u64>());
    (sizes, dim, options).prop_flat_map(
        |((batch, kv_heads, group, steps), dim, (compensates, window, softcap, seed))| {
            let rows = batch * kv_heads;
            let length = prop_oneof![0usize..4, 0usize..400];
            (
                prop::collection::vec(length, rows),
                prop::collection::vec(0i64..6, rows),
                prop::collection::vec(prop_oneof![Just(0i64), 1i64..40], rows),
                prop::collection::vec(-1i64..5, rows),
            )
                .prop_map(move |(lengths, sinks, recent, counts)| Case {
                    batch,
                    kv_heads,
                    group,
                    steps,
                    dim,
                    lengths,
                    sinks,
                    recent,
                    counts: compensates.then_some(counts),
                    window: window.filter(|_| !compensates),
                    softcap,
                    sunk: seed % 2 == 0,
                    seed,
                })
        },
    )
}

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_layer_in_any_storage(case in cases(), threads in 1usize..4) {
        for isa in available() {
            case.check::<f32>(isa, threads, |x| x);
            case.check::<bf16>(isa, threads, bf16::from_f32);
            case.check::<f16>(isa, threads, f16::from_f32);
            case.check_codes::<f32, i8>(isa, threads, |x| Floats::F32(x), 2e-5);
            case.check_codes::<bf16, i8>(isa, threads, |x| Floats::Bf16(x), 3e-4);
            if case.dim % 2 == 0 {
                case.check_codes::<f32, u8>(isa, threads, |x| Floats::F32(x), 2e-5);
                case.check_codes::<f16, u8>(isa, threads, |x| Floats::F16(x), 3e-4);
            }
        }
    }
}

/// The largest codes with a query whose channels are all the same: a sum that wrapped would choose the other entries.
#[test]
fn sums_of_the_largest_codes_fit() {
    for dim in [512, 1024] {
        let (mut codes, positions) = (vec![-127i8; 66 * dim], (0..66).collect::<Vec<i32>>());
        codes[65 * dim..].fill(127);
        let layer = Layer {
            head_dim: dim,
            keys: &codes,
            values: &codes,
            positions: &positions,
            rows: Rows { start: &[0], length: &[66], capacity: &[66] },
            sinks: &[0],
            recent: &[0],
            sums: None,
            scales: Some(Floats::Bf16(&[bf16::ONE; 132])),
            residual: None,
        };
        let mut data = vec![0.0f32; dim];
        data[0] = 1.0;
        let ask = Queries { batch: 1, heads: 1, steps: 1, data: &data, positions: &[65], sink_logits: None };
        for isa in available() {
            let options = Options { scale: 1.0, sliding_window: None, softcap: None, threads: 1, isa };
            let mut out = vec![0.0f32; dim];
            attend(&layer, &ask, &options, &mut out).unwrap();
            let want = 127.0 * (dim as f32).sqrt();
            assert!((out[0] - want).abs() < 1e-4 * want, "{isa:?}, D {dim}: {} is not {want}", out[0]);
        }
    }
}

fn skewed(lengths: Vec<usize>) -> Case {
    let rows = lengths.len();
    Case {
        batch: 1,
        kv_heads: rows,
        group: 4,
        steps: 1,
        dim: 64,
        lengths,
        sinks: vec![0; rows],
        recent: vec![0; rows],
        counts: None,
        window: None,
        softcap: None,
        sunk: true,
        seed: 7,
    }
}

#[test]
fn one_huge_row_beside_tiny_and_empty_ones() {
    for isa in available() {
        skewed(vec![1, 0, 20_001, 63, 0]).check::<f32>(isa, 3, |x| x);
    }
}

#[test]
fn nothing_stored_gives_zero() {
    skewed(vec![0, 0]).check::<f32>(Isa::detect(), 2, |x| x);
}

#[test]
fn wrong_sizes_are_refused() {
    let (keys, positions, out_positions) = ([1.0f32; 8], [0, 1], [1]);
    let rows = Rows { start: &[0], length: &[2], capacity: &[2] };
    let good = Layer {
        head_dim: 4,
        keys: &keys,
        values: &keys,
        positions: &positions,
        rows,
        sinks: &[0],
        recent: &[0],
        sums: None,
        scales: None,
        residual: None,
    };
    let none = Some(&[f32::NEG_INFINITY][..]);
    let ask = Queries {
        batch: 1,
        heads: 1,
        steps: 1,
        data: &keys[..4],
        positions: &out_positions,
        sink_logits: none,
    };
    let options = Options { scale: 0.5, sliding_window: None, softcap: None, threads: 1, isa: Isa::detect() };
    let fails = |layer: Layer<f32, f32>, queries: Queries, options: Options, size: usize| {
        attend(&layer, &queries, &options, &mut vec![0.0; size]).is_err()
    };
    assert!(!fails(good, ask, options, 4));
    assert!(fails(good, ask, options, 3));
    assert!(fails(Layer { keys: &keys[1..], ..good }, ask, options, 4));
    assert!(fails(Layer { values: &keys[1..], ..good }, ask, options, 4));
    assert!(fails(Layer { head_dim: 0, ..good }, ask, options, 4));
    assert!(fails(Layer { positions: &positions[1..], ..good }, ask, options, 4));
    let bytes = [0u8; 4];
    let mut codes = Layer {
        head_dim: 4,
        keys: &bytes,
        values: &bytes,
        positions: &positions,
        rows,
        sinks: &[0],
        recent: &[0],
        sums: None,
        scales: Some(Floats::F32(&[1.0; 4])),
        residual: None,
    };
    assert!(attend(&codes, &ask, &options, &mut [0.0; 4]).is_ok());
    codes.values = &bytes[1..];
    assert!(attend(&codes, &ask, &options, &mut [0.0; 4]).is_err());
    codes = Layer { head_dim: 3, values: &bytes, ..codes };
    let error = attend(&codes, &Queries { data: &keys[..3], ..ask }, &options, &mut [0.0; 3]).unwrap_err();
    assert!(error.to_string().contains("even"), "{error}");
    let held = |size, count| {
        let rings = Floats::F32(&[1.0; 8]);
        Some(Residual { size, keys: rings, values: rings, count })
    };
    assert!(fails(Layer { residual: held(2, &[1]), ..good }, ask, options, 4), "without scales");
    codes = Layer { head_dim: 4, residual: held(2, &[1]), ..codes };
    assert!(attend(&codes, &ask, &options, &mut [0.0; 4]).is_ok());
    for wrong in [held(0, &[1]), held(3, &[1]), held(2, &[-1]), held(2, &[])] {
        assert!(attend(&Layer { residual: wrong, ..codes }, &ask, &options, &mut [0.0; 4]).is_err());
    }
    assert!(fails(Layer { rows: Rows { length: &[3], ..rows }, ..good }, ask, options, 4));
    assert!(fails(Layer { rows: Rows { start: &[1], ..rows }, ..good }, ask, options, 4));
    assert!(fails(Layer { sinks: &[-1], ..good }, ask, options, 4));
    assert!(fails(Layer { recent: &[], ..good }, ask, options, 4));
    assert!(fails(Layer { scales: Some(Floats::F32(&[1.0; 3])), ..good }, ask, options, 4));
    let sums = Sums { key: &[0.0; 3], value: &[0.0; 4], count: &[0] };
    assert!(fails(Layer { sums: Some(sums), ..good }, ask, options, 4));
    let sums = Sums { key: &[0.0; 4], ..sums };
    assert!(fails(
        Layer { sums: Some(sums), ..good },
        ask,
        Options { sliding_window: Some(3), ..options },
        4
    ));
    assert!(fails(good, Queries { batch: 2, ..ask }, options, 4));
    assert!(fails(good, Queries { heads: 0, ..ask }, options, 0));
    assert!(fails(good, Queries { positions: &[], ..ask }, options, 4));
    for sinks in [&[][..], &[0.0; 2], &[f32::NAN], &[f32::INFINITY]] {
        assert!(fails(good, Queries { sink_logits: Some(sinks), ..ask }, options, 4));
    }
    assert!(fails(good, ask, Options { scale: f32::NAN, ..options }, 4));
    assert!(fails(good, ask, Options { softcap: Some(0.0), ..options }, 4));
    assert!(fails(good, ask, Options { sliding_window: Some(0), ..options }, 4));
}

#[test]
fn what_is_not_a_number_stays_so() {
    let mut keys = vec![0.5f32; 200 * 4];
    keys[70 * 4] = f32::NAN;
    let positions: Vec<i32> = (0..200).collect();
    let rows = Rows { start: &[0], length: &[200], capacity: &[200] };
    let layer = Layer {
        head_dim: 4,
        keys: &keys,
        values: &keys,
        positions: &positions,
        rows,
        sinks: &[0],
        recent: &[0],
        sums: None,
        scales: None,
        residual: None,
    };
    let sink_logits = Some(&[0.5][..]);
    let ask = Queries { batch: 1, heads: 1, steps: 1, data: &[1.0; 4], positions: &[199], sink_logits };
    for isa in available() {
        let options = Options { scale: 0.5, sliding_window: None, softcap: None, threads: 1, isa };
        let mut out = [0.0; 4];
        attend(&layer, &ask, &options, &mut out).unwrap();
        assert!(out.iter().all(|x| x.is_nan()), "{isa:?}: {out:?}");
    }
}

/// Entries of codes, read as floats or as whole numbers: a key, a value or a query that is no number, and one that is infinite.
#[test]
fn codes_of_what_is_not_a_number_stay_so() {
    let (codes, positions) = ([3i8; 200 * 64], (0..200).collect::<Vec<i32>>());
    let rows = Rows { start: &[0], length: &[200], capacity: &[200] };
    let (nan, infinite) = (f32::NAN, f32::INFINITY);
    for (what, bad) in
        [("key", nan), ("value", nan), ("value", infinite), ("query", nan), ("query", infinite)]
    {
        let mut scales = vec![bf16::from_f32(0.01); 400];
        let mut data = [0.25; 2 * 64];
        match what {
            "key" => scales[2 * 70] = bf16::from_f32(bad),
            "value" => scales[2 * 70 + 1] = bf16::from_f32(bad),
            _ => data[7] = bad,
        }
        let layer = Layer {
            head_dim: 64,
            keys: &codes,
            values: &codes,
            positions: &positions,
            rows,
            sinks: &[0],
            recent: &[0],
            sums: None,
            scales: Some(Floats::Bf16(&scales)),
            residual: None,
        };
        let ask = Queries { batch: 1, heads: 2, steps: 1, data: &data, positions: &[199], sink_logits: None };
        for isa in available() {
            let options = Options { scale: 0.5, sliding_window: None, softcap: None, threads: 1, isa };
            let mut out = [0.0f32; 2 * 64];
            attend(&layer, &ask, &options, &mut out).unwrap();
            let finite = |head: usize| out[head * 64..][..64].iter().all(|x| x.is_finite());
            assert!(!finite(0), "{isa:?}: {what} {bad}");
            assert_eq!(finite(1), what == "query", "{isa:?}: {what} {bad}");
        }
    }
}
