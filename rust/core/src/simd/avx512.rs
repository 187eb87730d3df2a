//! AVX-512: sixteen lanes.

use half::{bf16, f16};
use std::arch::x86_64::*;

use super::{Simd, Whole};

/// `VNNI`: the CPU multiplies whole numbers and adds them up in one instruction.
pub(crate) struct Avx512<const VNNI: bool = false>;

// SAFETY of every block: the caller promises the CPU features and the pointers (see `Simd`).
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type Vector = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(source) }
    }
    #[inline(always)]
    unsafe fn load_bf16(source: *const bf16) -> __m512 {
        unsafe {
            let half = _mm256_loadu_si256(source.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    unsafe fn load_even(source: *const [bf16; 2]) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(source.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_odd(source: *const [bf16; 2]) -> __m512 {
        unsafe {
            let pairs = _mm512_loadu_si512(source.cast());
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(source: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(source.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(source: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(source.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_lower(source: *const u8) -> __m512 {
        unsafe { codes(_mm512_cvtepu8_epi32(_mm_loadu_si128(source.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_upper(source: *const u8) -> __m512 {
        unsafe { codes(_mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(_mm_loadu_si128(source.cast())))) }
    }
    #[inline(always)]
    unsafe fn four_times(source: *const f32) -> __m512 {
        unsafe {
            let index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(source)))
        }
    }
    #[inline(always)]
    unsafe fn repeat(four: &[f32; 4]) -> __m512 {
        unsafe { _mm512_broadcast_f32x4(_mm_loadu_ps(four.as_ptr())) }
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(target, x) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m512, bound: __m512, value: __m512) -> __m512 {
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, bound), value) }
    }
    #[inline(always)]
    unsafe fn shift_exponent(x: __m512, biased: __m512) -> __m512 {
        unsafe {
            let shift = _mm512_slli_epi32::<23>(_mm512_castps_si512(biased));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), shift))
        }
    }
    #[inline(always)]
    unsafe fn sums(x: &[__m512]) -> __m512 {
        unsafe { sums::<false>(x) }
    }
}

// SAFETY of every block: the caller promises the CPU features and the pointers (see `Whole`).
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const VNNI: bool> Whole for Avx512<VNNI> {
    type Bytes = __m256i;
    type Whole = __m512i;

    #[inline(always)]
    unsafe fn load_bytes(source: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(source.cast()) }
    }
    #[inline(always)]
    unsafe fn load_whole(source: *const i16) -> __m512i {
        unsafe { _mm512_loadu_si512(source.cast()) }
    }
    #[inline(always)]
    unsafe fn interleave(a: __m256i, b: __m256i) -> [__m256i; 2] {
        unsafe {
            // Of quarters 0, 2, 1, 3 the instructions, which keep to halves, take the first two and the last two.
            let (a, b) = (_mm256_permute4x64_epi64::<0xd8>(a), _mm256_permute4x64_epi64::<0xd8>(b));
            [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)]
        }
    }
    #[inline(always)]
    unsafe fn signed(bytes: __m256i) -> __m512i {
        unsafe { _mm512_cvtepi8_epi16(bytes) }
    }
    #[inline(always)]
    unsafe fn lower(bytes: __m256i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_cvtepu8_epi16(bytes), _mm512_set1_epi16(15)) }
    }
    #[inline(always)]
    unsafe fn upper(bytes: __m256i) -> __m512i {
        unsafe { _mm512_srli_epi16::<4>(_mm512_cvtepu8_epi16(bytes)) }
    }
    #[inline(always)]
    unsafe fn splat_pair(pair: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(pair.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn none() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn add_products(a: __m512i, b: __m512i, sums: __m512i) -> __m512i {
        unsafe {
            if VNNI {
                _mm512_dpwssd_epi32(sums, a, b)
            } else {
                _mm512_add_epi32(_mm512_madd_epi16(a, b), sums)
            }
        }
    }
    #[inline(always)]
    unsafe fn float(sums: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn totals(x: &[__m512i]) -> __m512 {
        unsafe {
            let sums = sums::<true>(std::slice::from_raw_parts(x.as_ptr().cast(), x.len()));
            Self::float(_mm512_castps_si512(sums))
        }
    }
}

/// The codes that the lowest 4 bits of each lane stand for: a table that fits a register.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn codes(index: __m512i) -> __m512 {
    unsafe {
        let table = _mm512_setr_ps(
            -15.0, -13.0, -11.0, -9.0, -7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0,
        );
        _mm512_permutexvar_ps(index, table)
    }
}

/// The sums of the lanes of each vector, of floats or of whole numbers.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn sums<const WHOLE: bool>(x: &[__m512]) -> __m512 {
    unsafe {
        let a = quarters::<WHOLE>(halves::<WHOLE>(x[0], x[4]), halves::<WHOLE>(x[8], x[12]));
        let b = quarters::<WHOLE>(halves::<WHOLE>(x[1], x[5]), halves::<WHOLE>(x[9], x[13]));
        let c = quarters::<WHOLE>(halves::<WHOLE>(x[2], x[6]), halves::<WHOLE>(x[10], x[14]));
        let d = quarters::<WHOLE>(halves::<WHOLE>(x[3], x[7]), halves::<WHOLE>(x[11], x[15]));
        let (e, f) = (eighths::<WHOLE>(a, b), eighths::<WHOLE>(c, d));
        plus::<WHOLE>(_mm512_shuffle_ps::<0x88>(e, f), _mm512_shuffle_ps::<0xdd>(e, f))
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn plus<const WHOLE: bool>(a: __m512, b: __m512) -> __m512 {
    unsafe {
        if WHOLE {
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
        } else {
            _mm512_add_ps(a, b)
        }
    }
}

/// The lower half is the sum of the halves of `a`, the upper one that of `b`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn halves<const WHOLE: bool>(a: __m512, b: __m512) -> __m512 {
    unsafe { plus::<WHOLE>(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4::<0x4e>(a, b)) }
}

/// The same of each half of `a` and then of `b`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn quarters<const WHOLE: bool>(a: __m512, b: __m512) -> __m512 {
    unsafe { plus::<WHOLE>(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)) }
}

/// Within each quarter: two lanes of `a`, two of `b`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn eighths<const WHOLE: bool>(a: __m512, b: __m512) -> __m512 {
    unsafe { plus::<WHOLE>(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps::<0x4e>(a, b)) }
}
