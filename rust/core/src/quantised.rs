//! Entries in 8 bits or in 4, as headkv/cache/quantised.py specifies them: rotated, and rounded to steps of a scale a vector.

use half::{bf16, f16};

use crate::element::Element;
use crate::error::{Result, check_len};
use crate::layer::check_dim;

/// Numbers of the dtype in which vectors come: of each entry the scale of its key's codes and of its value's, `[slots, 2]`; or
/// vectors that are held as they came.
#[derive(Clone, Copy)]
pub enum Floats<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// Of the two scales of an entry: which one is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Key,
    Value,
}

impl<'a> Floats<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Floats::F32(scales) => scales.len(),
            Floats::Bf16(scales) => scales.len(),
            Floats::F16(scales) => scales.len(),
        }
    }

    /// Writes the numbers from `at` on to `target`.
    pub(crate) fn widen(&self, at: usize, target: &mut [f32]) {
        match self {
            Floats::F32(numbers) => widen(&numbers[at..], target),
            Floats::Bf16(numbers) => widen(&numbers[at..], target),
            Floats::F16(numbers) => widen(&numbers[at..], target),
        }
    }

    /// The scales of the entries from `begin` to `end`.
    pub(crate) fn of(self, begin: usize, end: usize) -> Floats<'a> {
        match self {
            Floats::F32(scales) => Floats::F32(&scales[2 * begin..2 * end]),
            Floats::Bf16(scales) => Floats::Bf16(&scales[2 * begin..2 * end]),
            Floats::F16(scales) => Floats::F16(&scales[2 * begin..2 * end]),
        }
    }

    pub(crate) fn get(&self, entry: usize, side: Side) -> f32 {
        let mut one = [0.0];
        self.copy_to(entry, side, &mut one);
        one[0]
    }

    /// Writes one side's scales, of the entries from `begin` on, to `target`.
    #[inline(always)]
    pub(crate) fn copy_to(&self, begin: usize, side: Side, target: &mut [f32]) {
        match self {
            Floats::F32(scales) => one_side(scales, begin, side, target),
            Floats::Bf16(scales) => one_side(scales, begin, side, target),
            Floats::F16(scales) => one_side(scales, begin, side, target),
        }
    }
}

pub(crate) fn widen<T: Element>(vector: &[T], target: &mut [f32]) {
    target.iter_mut().zip(vector).for_each(|(to, x)| *to = x.channel(0));
}

#[inline(always)]
fn one_side<T: Element>(scales: &[T], begin: usize, side: Side, target: &mut [f32]) {
    let pairs = scales[2 * begin..].as_chunks::<2>().0;
    for (target, pair) in target.iter_mut().zip(pairs) {
        *target = pair[side as usize].channel(0);
    }
}

/// A dtype in which vectors come, and scales are stored.
pub trait Float: Element {
    /// The smallest normal number.
    const TINY: f32;
    fn from_f32(x: f32) -> Self;
}

impl Float for f32 {
    const TINY: f32 = f32::MIN_POSITIVE;
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Float for bf16 {
    const TINY: f32 = f32::MIN_POSITIVE;
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

impl Float for f16 {
    const TINY: f32 = 6.103_515_6e-5;
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

/// `x` `[D]` times the Hadamard matrix of as many channels as the largest power of two that divides D, in place: its own
/// inverse. The order of sums is the specification's.
pub(crate) fn rotate(x: &mut [f32]) {
    let width = x.len() & x.len().wrapping_neg();
    let mut step = 1;
    while step < width {
        for pair in x.chunks_exact_mut(2 * step) {
            let (left, right) = pair.split_at_mut(step);
            for (left, right) in left.iter_mut().zip(right) {
                (*left, *right) = (*left + *right, *left - *right);
            }
        }
        step *= 2;
    }
    let norm = (width as f64).powf(-0.5) as f32;
    x.iter_mut().for_each(|x| *x *= norm);
}

/// What holds the codes of `CHANNELS` channels.
pub trait Code: Element {
    /// What the largest channel is in scales.
    const LARGEST: f32;
    /// The codes nearest to channels that were divided by the scale; of what is no number, the one of least bits.
    fn nearest(channels: &[f32]) -> Self;
}

/// The whole numbers from -127 to 127.
impl Code for i8 {
    const LARGEST: f32 = 127.0;

    #[inline(always)]
    fn nearest(channels: &[f32]) -> Self {
        channels[0].round_ties_even().clamp(-127.0, 127.0) as i8
    }
}

/// The odd ones from -15 to 15, the middles of 16 equal cells, two a byte.
impl Code for u8 {
    const LARGEST: f32 = 16.0;

    #[inline(always)]
    fn nearest(channels: &[f32]) -> Self {
        let half = |x: f32| (x * 0.5 + 7.5).round_ties_even().clamp(0.0, 15.0) as u8;
        half(channels[0]) | half(channels[1]) << 4
    }
}

/// Vectors `[m, D]` as codes `[m, D / CHANNELS]` and scales `[m]`.
pub fn quantise<T: Float, C: Code>(
    head_dim: usize,
    vectors: &[T],
    codes: &mut [C],
    scales: &mut [T],
) -> Result<()> {
    check_dim::<C>(head_dim)?;
    check_len("codes", codes.len(), vectors.len() / C::CHANNELS)?;
    check_len("vectors", vectors.len(), scales.len() * head_dim)?;
    let mut turned = vec![0.0f32; head_dim];
    let each = vectors.chunks_exact(head_dim).zip(codes.chunks_exact_mut(head_dim / C::CHANNELS)).zip(scales);
    for ((vector, codes), scale) in each {
        widen(vector, &mut turned);
        rotate(&mut turned);
        // What is no number becomes the scale.
        let largest =
            turned.iter().fold(0.0f32, |top, x| if x.is_nan() || x.abs() > top { x.abs() } else { top });
        *scale = T::from_f32(largest / C::LARGEST);
        if scale.channel(0) < T::TINY {
            *scale = T::from_f32(T::TINY);
        }
        let step = scale.channel(0);
        turned.iter_mut().for_each(|x| *x /= step);
        for (code, channels) in codes.iter_mut().zip(turned.chunks_exact(C::CHANNELS)) {
            *code = C::nearest(channels);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_is_its_own_inverse() {
        for dim in [1, 5, 24, 64, 80] {
            let x: Vec<f32> = (0..dim).map(|i| (i * 7 % 13) as f32 - 6.0).collect();
            let mut turned = x.clone();
            rotate(&mut turned);
            let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
            assert!((norm(&turned) - norm(&x)).abs() < 1e-3 * norm(&x), "{dim}");
            rotate(&mut turned);
            assert!(turned.iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-4), "{dim}");
        }
    }

    /// The largest error of codes `C` in scales, and the codes.
    fn error<C: Code>() -> (f32, Vec<C>) {
        let x: Vec<bf16> = (0..128).map(|i| bf16::from_f32((i * 37 % 101) as f32 - 50.0)).collect();
        let (mut codes, mut scales) = (vec![C::default(); 128 / C::CHANNELS], vec![bf16::ZERO; 2]);
        quantise(64, &x, &mut codes, &mut scales).unwrap();
        let mut worst = 0.0f32;
        for ((x, codes), scale) in x.chunks(64).zip(codes.chunks(64 / C::CHANNELS)).zip(&scales) {
            let mut turned: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
            rotate(&mut turned);
            for (i, x) in turned.iter().enumerate() {
                let code = codes[i / C::CHANNELS].channel(i % C::CHANNELS);
                worst = worst.max((x / scale.to_f32() - code).abs());
            }
        }
        assert!(quantise(64, &x, &mut codes[1..], &mut scales).is_err());
        assert!(quantise(0, &x, &mut codes, &mut scales).is_err());
        (worst, codes)
    }

    #[test]
    fn codes_are_off_by_at_most_half_a_scale_or_a_whole_one_in_4_bits() {
        assert!(error::<i8>().0 <= 0.5);
        let (worst, bytes) = error::<u8>();
        assert!(worst <= 1.0 + 16.0 / 256.0, "{worst}"); // the scale is rounded as well
        assert!(bytes.iter().any(|byte| [0, 15].contains(&(byte & 15)) || [0, 15].contains(&(byte >> 4))));
        assert!(quantise(5, &[0.0f32; 5], &mut [0u8; 2], &mut [0.0]).is_err());
    }
}
