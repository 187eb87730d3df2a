//! What pools may hold, float32, bfloat16, float16 or 8-bit codes, and how each becomes float32.

use half::{bf16, f16};

use crate::simd::Simd;

/// A storage type of the pools. All arithmetic is done in `f32`.
pub trait Element: Copy + Default + Send + Sync + 'static {
    fn to_f32(self) -> f32;

    /// Loads `S::LANES` elements as `f32`.
    ///
    /// # Safety
    /// `source` must be valid for reading `S::LANES` elements and the CPU must have the features of `S`.
    unsafe fn load<S: Simd>(source: *const Self) -> S::Vector;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load(source) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(source) }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(source) }
    }
}

/// A code, without its scale.
impl Element for i8 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(source: *const Self) -> S::Vector {
        // SAFETY: the caller's promise.
        unsafe { S::load_i8(source) }
    }
}
