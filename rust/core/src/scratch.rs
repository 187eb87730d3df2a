//! Vectors in f32 beside pools of `T`: the first channels of all elements, then any second ones, as loading a run of elements
//! gives them. Each such run is rounded up to whole vectors of any instruction set.

use crate::element::Element;
use crate::simd::MAX_LANES;

/// Numbers from one run to the next.
pub(crate) fn run<T: Element>(head_dim: usize) -> usize {
    (head_dim / T::CHANNELS).next_multiple_of(MAX_LANES)
}

/// Numbers that a vector takes.
pub(crate) fn width<T: Element>(head_dim: usize) -> usize {
    T::CHANNELS * run::<T>(head_dim)
}

/// Writes `vector` `[D]` to `scratch` `[width]`, whose padding stays as it is.
pub(crate) fn spread<T: Element>(vector: &[f32], scratch: &mut [f32]) {
    for (which, run) in scratch.chunks_exact_mut(run::<T>(vector.len())).enumerate() {
        let elements = vector.chunks_exact(T::CHANNELS);
        run.iter_mut().zip(elements).for_each(|(to, channels)| *to = channels[which]);
    }
}

/// Adds `weight` times what `scratch` `[width]` holds to `vector` `[D]`.
pub(crate) fn collect<T: Element>(weight: f32, scratch: &[f32], vector: &mut [f32]) {
    for (which, run) in scratch.chunks_exact(run::<T>(vector.len())).enumerate() {
        let elements = vector.chunks_exact_mut(T::CHANNELS);
        elements.zip(run).for_each(|(channels, x)| channels[which] += weight * x);
    }
}
