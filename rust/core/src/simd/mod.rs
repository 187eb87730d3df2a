//! The handful of vector operations that the kernel is written in, once for every instruction set.
//!
//! They must end up inlined in a function that has the CPU's features. A closure that the compiler leaves apart has none: its
//! vectors go through memory, many times as slowly, which only the disassembly shows. `array::from_fn` of vectors was such a
//! one; a loop can not be.

use half::{bf16, f16};

use crate::error::{Error, Result};

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

/// The widest vector of any instruction set, in `f32` lanes. Rows of scratch are padded to it.
pub(crate) const MAX_LANES: usize = 16;

/// Vectors of `f32`. `LANES` is a multiple of 4 that divides [`MAX_LANES`].
///
/// # Safety
/// Every function needs a CPU with the features of the instruction set; loads and stores need pointers
/// that are valid for `LANES` elements (of any alignment).
#[allow(clippy::missing_safety_doc)]
pub trait Simd {
    type Vector: Copy;
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::Vector;
    unsafe fn load(source: *const f32) -> Self::Vector;
    unsafe fn load_bf16(source: *const bf16) -> Self::Vector;
    /// The first of each of `LANES` pairs.
    unsafe fn load_even(source: *const [bf16; 2]) -> Self::Vector;
    unsafe fn load_odd(source: *const [bf16; 2]) -> Self::Vector;
    unsafe fn load_f16(source: *const f16) -> Self::Vector;
    unsafe fn load_i8(source: *const i8) -> Self::Vector;
    /// The codes of 4 bits, 2 n - 15, in the lower halves of bytes.
    unsafe fn load_lower(source: *const u8) -> Self::Vector;
    /// Those in the upper halves.
    unsafe fn load_upper(source: *const u8) -> Self::Vector;
    /// `LANES / 4` numbers, each four times.
    unsafe fn four_times(source: *const f32) -> Self::Vector;
    /// Four numbers, over and over.
    unsafe fn repeat(four: &[f32; 4]) -> Self::Vector;
    unsafe fn store(target: *mut f32, x: Self::Vector);
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn sub(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    unsafe fn div(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`
    unsafe fn fma(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// `b` where `a` or `b` is not a number.
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `x` where `x >= bound` or `x` is not a number, 0 elsewhere, applied to `value`.
    unsafe fn zero_below(x: Self::Vector, bound: Self::Vector, value: Self::Vector) -> Self::Vector;
    /// `x * 2^n`, where the low bits of `biased` hold the small integer n.
    unsafe fn shift_exponent(x: Self::Vector, biased: Self::Vector) -> Self::Vector;
    /// The sums of the lanes of each of `LANES` vectors.
    unsafe fn sums(x: &[Self::Vector]) -> Self::Vector;
}

/// Vectors of `2 * LANES` whole numbers of 16 bits, and of sums of their products, `LANES` of 32 bits.
///
/// # Safety
/// As for [`Simd`]; loads need pointers that are valid for `2 * LANES` numbers.
#[allow(clippy::missing_safety_doc)]
pub trait Whole: Simd {
    /// `2 * LANES` bytes
    type Bytes: Copy;
    type Whole: Copy;

    unsafe fn load_bytes(source: *const u8) -> Self::Bytes;
    unsafe fn load_whole(source: *const i16) -> Self::Whole;
    /// The bytes of `a` and `b` in turns.
    unsafe fn interleave(a: Self::Bytes, b: Self::Bytes) -> [Self::Bytes; 2];
    /// Bytes with a sign.
    unsafe fn signed(bytes: Self::Bytes) -> Self::Whole;
    /// The lower 4 bits of bytes.
    unsafe fn lower(bytes: Self::Bytes) -> Self::Whole;
    /// The upper ones.
    unsafe fn upper(bytes: Self::Bytes) -> Self::Whole;
    /// Two numbers of 16 bits, over and over.
    unsafe fn splat_pair(pair: u32) -> Self::Whole;
    /// Sums of nothing.
    unsafe fn none() -> Self::Whole;
    /// `sums`, each with two more products.
    unsafe fn add_products(a: Self::Whole, b: Self::Whole, sums: Self::Whole) -> Self::Whole;
    unsafe fn float(sums: Self::Whole) -> Self::Vector;
    /// The sums of the lanes of each of `LANES` vectors of sums; together they fit 32 bits.
    unsafe fn totals(sums: &[Self::Whole]) -> Self::Vector;
}

/// An instruction set, chosen at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    Avx512Vnni,
    Avx512,
    Avx2,
    Neon,
    Portable,
}

impl Isa {
    pub const ALL: [Isa; 5] = [Isa::Avx512Vnni, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// The best one that this CPU has.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => is_x86_feature_detected!("avx512vnni") && Isa::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && Isa::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            Isa::Portable => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    pub(crate) fn require(self) -> Result<()> {
        if self.is_available() {
            return Ok(());
        }
        Err(Error::new(format!("isa must be one that this CPU has, got {}", self.name())))
    }
}

/// Asks for the cache line at `address`; harmless whatever the address is.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and SSE is part of x86_64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
