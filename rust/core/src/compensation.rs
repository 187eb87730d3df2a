//! The one entry that stands for everything outside a compensating row's window (RazorAttention, arXiv 2407.15891,
//! section 3.2): mean key, mean value, and ln N on its logit.

use crate::element::Element;
use crate::layer::{Layer, Span, Visible};
use crate::quantised::{Floats, Side, rotate};

/// Entries summed before their sum is added to the total, which keeps the rounding error small.
const BLOCK: usize = 256;

pub(crate) struct Mean {
    pub key: Vec<f32>,
    pub value: Vec<f32>,
    pub log_count: f32,
}

/// The compensation entry of a row for each step; `visible` `[T]` is what the steps see. Empty for a row that does not
/// compensate.
pub(crate) fn means<K: Element, V: Element>(
    layer: &Layer<K, V>,
    row: usize,
    visible: &[Visible],
) -> Vec<Option<Mean>> {
    let (Some(dropped), Some(sums)) = (layer.compensates(row), layer.sums) else {
        return Vec::new();
    };
    let dim = layer.head_dim;
    let (keys, values, _) = layer.row(row);
    let mut key = sums.key[row * dim..][..dim].to_vec();
    let mut value = sums.value[row * dim..][..dim].to_vec();
    let scales = layer.scales_of(row);

    // What a row hides grows with the step's position: each entry is added once, in that order.
    let hidden = |step: usize| match visible[step] {
        seen if layer.recent[row] > 0 => Span::new(seen.sinks.end, seen.tail.begin),
        _ => Span::default(),
    };
    let mut steps: Vec<usize> = (0..visible.len()).collect();
    steps.sort_by_key(|&step| (hidden(step).len(), step));
    let mut means: Vec<Option<Mean>> = visible.iter().map(|_| None).collect();
    let mut added = 0;
    for step in steps {
        let span = hidden(step);
        let fresh = Span::new(span.begin + added, span.end);
        add_entries(keys, scales.map(|scales| (scales, Side::Key)), fresh, &mut key);
        add_entries(values, scales.map(|scales| (scales, Side::Value)), fresh, &mut value);
        added = span.len();
        let count = dropped as f64 + added as f64;
        if count > 0.0 {
            let mean = |sum: &[f32]| sum.iter().map(|x| x / count as f32).collect();
            means[step] = Some(Mean { key: mean(&key), value: mean(&value), log_count: count.ln() as f32 });
        }
    }
    means
}

fn add_entries<T: Element>(entries: &[T], scales: Option<(Floats, Side)>, span: Span, total: &mut [f32]) {
    let dim = total.len();
    let mut part = vec![0.0f32; dim];
    let (mut at, elements) = (span.begin, dim / T::CHANNELS);
    for block in entries[span.begin * elements..span.end * elements].chunks(BLOCK * elements) {
        part.fill(0.0);
        for entry in block.chunks_exact(elements) {
            let scale = scales.map_or(1.0, |(scales, side)| scales.get(at, side));
            for (sums, x) in part.chunks_exact_mut(T::CHANNELS).zip(entry) {
                sums.iter_mut().enumerate().for_each(|(which, sum)| *sum += x.channel(which) * scale);
            }
            at += 1;
        }
        if scales.is_some() {
            rotate(&mut part);
        }
        total.iter_mut().zip(&part).for_each(|(sum, x)| *sum += x);
    }
}
