//! NEON: four lanes.

use half::{bf16, f16};
use std::arch::aarch64::*;

use super::Simd;

pub(crate) struct Neon;

// SAFETY of every block: NEON is part of aarch64; the caller promises the pointers (see `Simd`).
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Neon {
    type Vector = float32x4_t;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(source) }
    }
    #[inline(always)]
    unsafe fn load_bf16(source: *const bf16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(source.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_even(source: *const [bf16; 2]) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vld1q_u32(source.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_odd(source: *const [bf16; 2]) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vandq_u32(vld1q_u32(source.cast()), vdupq_n_u32(!0xffff))) }
    }
    /// With integer operations: the half-precision vector types are young in the compiler.
    #[inline(always)]
    unsafe fn load_f16(source: *const f16) -> float32x4_t {
        unsafe {
            let wide = vmovl_u16(vld1_u16(source.cast()));
            let sign = vshlq_n_u32::<16>(vandq_u32(wide, vdupq_n_u32(0x8000)));
            let magnitude = vshlq_n_u32::<13>(vandq_u32(wide, vdupq_n_u32(0x7fff)));
            // 2^112 moves the exponent's bias from 15 to 127 and makes subnormal numbers normal.
            let scaled =
                vmulq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(f32::from_bits(0x7780_0000)));
            let special = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00 << 13));
            let infinite = vorrq_u32(magnitude, vdupq_n_u32(0x7f80_0000));
            let finite = vreinterpretq_u32_f32(scaled);
            vreinterpretq_f32_u32(vorrq_u32(sign, vbslq_u32(special, infinite, finite)))
        }
    }
    /// Four bytes, as a vector of eight may reach past the end.
    #[inline(always)]
    unsafe fn load_i8(source: *const i8) -> float32x4_t {
        unsafe {
            let four = source.cast::<u32>().read_unaligned();
            let wide = vmovl_s8(vcreate_s8(u64::from(four)));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_lower(source: *const u8) -> float32x4_t {
        unsafe { codes(vandq_u32(four_bytes(source), vdupq_n_u32(15))) }
    }
    #[inline(always)]
    unsafe fn load_upper(source: *const u8) -> float32x4_t {
        unsafe { codes(vshrq_n_u32::<4>(four_bytes(source))) }
    }
    #[inline(always)]
    unsafe fn four_times(source: *const f32) -> float32x4_t {
        unsafe { vld1q_dup_f32(source) }
    }
    #[inline(always)]
    unsafe fn repeat(four: &[f32; 4]) -> float32x4_t {
        unsafe { vld1q_f32(four.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, x: float32x4_t) {
        unsafe { vst1q_f32(target, x) }
    }
    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: float32x4_t, bound: float32x4_t, value: float32x4_t) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vcltq_f32(x, bound))) }
    }
    #[inline(always)]
    unsafe fn shift_exponent(x: float32x4_t, biased: float32x4_t) -> float32x4_t {
        unsafe {
            let shift = vshlq_n_u32::<23>(vreinterpretq_u32_f32(biased));
            vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x), shift))
        }
    }
    #[inline(always)]
    unsafe fn sums(x: &[float32x4_t]) -> float32x4_t {
        unsafe { vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])) }
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn four_bytes(source: *const u8) -> uint32x4_t {
    unsafe {
        let four = source.cast::<u32>().read_unaligned();
        vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(u64::from(four)))))
    }
}

/// `2 n - 15`
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn codes(n: uint32x4_t) -> float32x4_t {
    unsafe { vfmaq_f32(vdupq_n_f32(-15.0), vcvtq_f32_u32(n), vdupq_n_f32(2.0)) }
}
