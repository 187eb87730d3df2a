//! What pools may hold, float32, bfloat16, float16 or codes of 8 or 4 bits, and how each becomes float32.

use half::{bf16, f16};

use crate::simd::{Simd, Whole};

/// A channel is `step` times a whole number, and `base`.
#[derive(Clone, Copy, Default)]
pub struct Affine {
    pub step: f32,
    pub base: f32,
}

/// A storage type of the pools. All arithmetic is done in `f32`.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Channels that one element holds.
    const CHANNELS: usize = 1;

    /// As what vectors of even length are read: pairs, where vectors of pairs are cheaper to widen.
    type Paired: Element;

    fn paired(elements: &[Self]) -> &[Self::Paired];

    /// Its channel `which`, below `CHANNELS`.
    fn channel(self, which: usize) -> f32;

    /// Channel `which` of each of `S::LANES` elements.
    ///
    /// # Safety
    /// `source` must be valid for reading `S::LANES` elements and the CPU must have the features of `S`.
    unsafe fn load<S: Simd>(source: *const Self, which: usize) -> S::Vector;

    /// Of codes, which fill a byte: what the whole numbers mean that `whole` gives.
    const CODE: Option<Affine> = None;

    /// That whole number of channel `which` of each byte.
    ///
    /// # Safety
    /// The CPU must have the features of `S`.
    unsafe fn whole<S: Whole>(_bytes: S::Bytes, _which: usize) -> S::Whole {
        unreachable!("only codes are whole numbers")
    }
}

impl Element for f32 {
    type Paired = Self;

    fn paired(elements: &[Self]) -> &[Self] {
        elements
    }

    #[inline(always)]
    fn channel(self, _: usize) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self, _: usize) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load(source) }
    }
}

impl Element for bf16 {
    type Paired = [bf16; 2];

    fn paired(elements: &[Self]) -> &[Self::Paired] {
        elements.as_chunks().0
    }

    #[inline(always)]
    fn channel(self, _: usize) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self, _: usize) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(source) }
    }
}

/// Each is half of a 32-bit number, which a shift or a mask makes a float32.
impl Element for [bf16; 2] {
    const CHANNELS: usize = 2;
    type Paired = Self;

    fn paired(elements: &[Self]) -> &[Self] {
        elements
    }

    #[inline(always)]
    fn channel(self, which: usize) -> f32 {
        self[which].channel(0)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self, which: usize) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { if which == 0 { S::load_even(source) } else { S::load_odd(source) } }
    }
}

impl Element for f16 {
    type Paired = Self;

    fn paired(elements: &[Self]) -> &[Self] {
        elements
    }

    #[inline(always)]
    fn channel(self, _: usize) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self, _: usize) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(source) }
    }
}

/// A code, without its scale.
impl Element for i8 {
    type Paired = Self;

    fn paired(elements: &[Self]) -> &[Self] {
        elements
    }

    #[inline(always)]
    fn channel(self, _: usize) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self, _: usize) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load_i8(source) }
    }

    const CODE: Option<Affine> = Some(Affine { step: 1.0, base: 0.0 });

    #[inline(always)]
    unsafe fn whole<S: Whole>(bytes: S::Bytes, _: usize) -> S::Whole {
        // SAFETY: the caller's promise.
        unsafe { S::signed(bytes) }
    }
}

/// Two codes of 4 bits, without their scale: the even channel's in the lower half, each as (code + 15) / 2.
impl Element for u8 {
    const CHANNELS: usize = 2;
    type Paired = Self;

    fn paired(elements: &[Self]) -> &[Self] {
        elements
    }

    #[inline(always)]
    fn channel(self, which: usize) -> f32 {
        2.0 * f32::from((self >> (4 * which)) & 15) - 15.0
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self, which: usize) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { if which == 0 { S::load_lower(source) } else { S::load_upper(source) } }
    }

    const CODE: Option<Affine> = Some(Affine { step: 2.0, base: -15.0 });

    #[inline(always)]
    unsafe fn whole<S: Whole>(bytes: S::Bytes, which: usize) -> S::Whole {
        // SAFETY: the caller's promise.
        unsafe { if which == 0 { S::lower(bytes) } else { S::upper(bytes) } }
    }
}
