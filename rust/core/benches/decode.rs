//! A thread decodes over a row: nanoseconds an entry where the second-level cache holds the row, and from memory the
//! bandwidth, also as a share of what plain reading of the same bytes reaches. For each instruction set that this CPU has.
//!
//!     cargo bench -p headkv-core --bench decode
//!     cargo bench -p headkv-core --bench decode -- avx2 bfloat16
//!     cargo bench -p headkv-core --bench decode -- avx2 128 4 --threads=2
//!
//! Arguments choose rows of the table by words of theirs; with `--near` the memory is left alone; with `--threads=N` as many
//! threads read from memory at once, each a row of its own. Every time is the least of many, so that a busy machine spoils
//! few. To compare two versions, build both and run their programs in turns.

use std::hint::black_box;
use std::time::{Duration, Instant};

use headkv_core::{Element, Floats, Isa, Layer, Options, Queries, Rows, attend, bf16, f16};

/// Bytes of keys and values that the second-level cache holds, and that no last level does.
const NEAR: usize = 1 << 20;
const FAR: usize = 400 << 20;
/// Head dimensions and query heads a KV head.
const SHAPES: [(usize, usize); 5] = [(128, 4), (128, 1), (128, 3), (128, 8), (64, 4)];
/// Bytes of a cache line.
const LINE: usize = 64;

fn main() {
    println!("isa      storage     D  group  near, ns  far, GB/s  of read");
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for (dim, group) in SHAPES {
            let number = |i: usize| (i * 7919 % 1021) as f32 / 512.0 - 1.0;
            let row = |storage, scaled| Case { isa, storage, dim, group, scaled };
            row("float32", false).measure(number);
            row("bfloat16", false).measure(|i| bf16::from_f32(number(i)));
            row("float16", false).measure(|i| f16::from_f32(number(i)));
            row("int8", true).measure(|i| (i * 89 % 255) as i8);
            row("int4", true).measure(|i| (i * 89 % 256) as u8);
        }
    }
}

/// A row of the table.
struct Case {
    isa: Isa,
    storage: &'static str,
    dim: usize,
    group: usize,
    /// Whether entries are codes with scales.
    scaled: bool,
}

impl Case {
    /// Prints the row, if it is wanted; `element` makes number i of a pool.
    fn measure<T: Element>(&self, element: impl Fn(usize) -> T) {
        let Case { isa, storage, dim, group, .. } = *self;
        let words = [isa.name(), storage, &dim.to_string(), &group.to_string()].map(str::to_owned);
        let (flags, chosen): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|a| a.starts_with("--"));
        if !chosen.iter().all(|word| words.contains(word)) {
            return;
        }
        let bytes = 2 * dim / T::CHANNELS * size_of::<T>();
        let row = Row::new(self, NEAR / bytes, &element);
        let [near] = least(Duration::from_millis(400), [&mut || row.attend(self)]);
        let near = near * 1e9 / (NEAR / bytes) as f64;
        print!("{:8} {storage:8} {dim:4} {group:6} {near:9.1}", isa.name());
        if !flags.iter().any(|flag| flag == "--near") {
            let threads = flags.iter().find_map(|flag| flag.strip_prefix("--threads=")).unwrap_or("1");
            let threads: usize = threads.parse().expect("--threads=N");
            let rows: Vec<_> = (0..threads).map(|_| Row::new(self, FAR / bytes, &element)).collect();
            let mut attend = || at_once(&rows, |row| row.attend(self));
            let mut read = || {
                at_once(&rows, |row| {
                    black_box(read(row.keys.slice()) ^ read(row.values.slice()));
                });
            };
            let [far, read] = least(Duration::from_secs(2), [&mut attend, &mut read]);
            print!(" {:10.1} {:8.2}", (threads * FAR) as f64 / far / 1e9, read / far);
        }
        println!();
    }
}

/// Least seconds of each of the calls, made in turns for a while.
fn least<const N: usize>(time: Duration, mut calls: [&mut dyn FnMut(); N]) -> [f64; N] {
    let (begin, mut least) = (Instant::now(), [f64::INFINITY; N]);
    while begin.elapsed() < time {
        for (call, least) in calls.iter_mut().zip(&mut least) {
            let begin = Instant::now();
            call();
            *least = least.min(begin.elapsed().as_secs_f64());
        }
    }
    least
}

/// Calls `work` with each item, on a thread of its own.
fn at_once<I: Sync>(items: &[I], work: impl Fn(&I) + Sync) {
    std::thread::scope(|scope| {
        for item in items {
            scope.spawn(|| work(item));
        }
    });
}

/// Reads all elements, as one plain loop.
fn read<T>(elements: &[T]) -> u64 {
    // SAFETY: any bits are a u64.
    let (_, words, _) = unsafe { elements.align_to::<u64>() };
    let mut sums = [0u64; 32];
    for chunk in words.as_chunks::<32>().0 {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum ^= word;
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

/// Elements that begin at a cache line, as torch's memory does.
struct Aligned<T> {
    padded: Vec<T>,
    begin: usize,
}

impl<T: Element> Aligned<T> {
    fn new(n: usize, element: impl Fn(usize) -> T) -> Self {
        let mut padded: Vec<T> = Vec::with_capacity(n + LINE / size_of::<T>());
        let begin = padded.as_ptr().align_offset(LINE);
        padded.resize(begin, T::default());
        padded.extend((0..n).map(element));
        Self { padded, begin }
    }

    fn slice(&self) -> &[T] {
        &self.padded[self.begin..]
    }
}

/// A layer of one row, and the queries that decode over it.
struct Row<T> {
    keys: Aligned<T>,
    values: Aligned<T>,
    positions: Vec<i32>,
    scales: Option<Vec<bf16>>,
    queries: Vec<f32>,
}

impl<T: Element> Row<T> {
    fn new(case: &Case, entries: usize, element: impl Fn(usize) -> T) -> Self {
        let elements = entries * case.dim / T::CHANNELS;
        Self {
            keys: Aligned::new(elements, &element),
            values: Aligned::new(elements, &element),
            positions: (0..entries as i32).collect(),
            scales: case.scaled.then(|| vec![bf16::from_f32(0.01); 2 * entries]),
            queries: (0..case.group * case.dim).map(|i| (i * 31 % 97) as f32 / 97.0 - 0.5).collect(),
        }
    }

    fn attend(&self, case: &Case) {
        let entries = [self.positions.len() as i64];
        let layer = Layer {
            head_dim: case.dim,
            keys: self.keys.slice(),
            values: self.values.slice(),
            positions: &self.positions,
            rows: Rows { start: &[0], length: &entries, capacity: &entries },
            sinks: &[0],
            recent: &[0],
            sums: None,
            scales: self.scales.as_deref().map(Floats::Bf16),
            residual: None,
        };
        let queries = Queries {
            batch: 1,
            heads: case.group,
            steps: 1,
            data: &self.queries,
            positions: &entries,
            sink_logits: None,
        };
        let options = Options { scale: 0.1, sliding_window: None, softcap: None, threads: 1, isa: case.isa };
        let mut out = vec![0.0; self.queries.len()];
        attend(&layer, &queries, &options, &mut out).expect("a layer of one row");
        black_box(out);
    }
}
