//! Any other CPU: arrays of eight, left to the compiler.

use half::{bf16, f16};

use super::Simd;
use crate::element::Element;

/// Plain loops over eight lanes, which the compiler turns into whatever vectors the target has.
pub(crate) struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn each(lane: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(lane)
}

/// Channel `which` of each of eight elements.
///
/// # Safety
/// `source` must be valid for reading eight elements.
#[inline(always)]
unsafe fn channels<T: Element>(source: *const T, which: usize) -> [f32; LANES] {
    // SAFETY: the caller's promise.
    let elements = unsafe { source.cast::<[T; LANES]>().read_unaligned() };
    each(|i| elements[i].channel(which))
}

// SAFETY of every block: the caller promises the pointers (see `Simd`).
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Portable {
    type Vector = [f32; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Vector {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self::Vector {
        unsafe { source.cast::<Self::Vector>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(source: *const bf16) -> Self::Vector {
        unsafe { channels(source, 0) }
    }
    #[inline(always)]
    unsafe fn load_even(source: *const [bf16; 2]) -> Self::Vector {
        unsafe { channels(source, 0) }
    }
    #[inline(always)]
    unsafe fn load_odd(source: *const [bf16; 2]) -> Self::Vector {
        unsafe { channels(source, 1) }
    }
    #[inline(always)]
    unsafe fn load_f16(source: *const f16) -> Self::Vector {
        unsafe { channels(source, 0) }
    }
    #[inline(always)]
    unsafe fn load_i8(source: *const i8) -> Self::Vector {
        unsafe { channels(source, 0) }
    }
    #[inline(always)]
    unsafe fn load_lower(source: *const u8) -> Self::Vector {
        unsafe { channels(source, 0) }
    }
    #[inline(always)]
    unsafe fn load_upper(source: *const u8) -> Self::Vector {
        unsafe { channels(source, 1) }
    }
    #[inline(always)]
    unsafe fn four_times(source: *const f32) -> Self::Vector {
        let numbers = unsafe { source.cast::<[f32; LANES / 4]>().read_unaligned() };
        each(|i| numbers[i / 4])
    }
    #[inline(always)]
    unsafe fn repeat(four: &[f32; 4]) -> Self::Vector {
        each(|i| four[i % 4])
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, x: Self::Vector) {
        unsafe { target.cast::<Self::Vector>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(|i| a[i] / b[i])
    }
    /// Not fused: without the instruction a fused multiply-add is a function call.
    #[inline(always)]
    unsafe fn fma(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn zero_below(x: Self::Vector, bound: Self::Vector, value: Self::Vector) -> Self::Vector {
        each(|i| if x[i] < bound[i] { 0.0 } else { value[i] })
    }
    #[inline(always)]
    unsafe fn shift_exponent(x: Self::Vector, biased: Self::Vector) -> Self::Vector {
        each(|i| f32::from_bits(x[i].to_bits().wrapping_add(biased[i].to_bits() << 23)))
    }
    #[inline(always)]
    unsafe fn sums(x: &[Self::Vector]) -> Self::Vector {
        each(|i| {
            let half: [f32; 4] = std::array::from_fn(|lane| x[i][lane] + x[i][lane + 4]);
            (half[0] + half[2]) + (half[1] + half[3])
        })
    }
}
