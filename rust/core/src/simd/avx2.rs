//! AVX2 with FMA and F16C: eight lanes.

use half::{bf16, f16};
use std::arch::x86_64::*;

use super::{Simd, Whole};

pub(crate) struct Avx2;

// SAFETY of every block: the caller promises the CPU features and the pointers (see `Simd`).
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(source: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(source) }
    }
    #[inline(always)]
    unsafe fn load_bf16(source: *const bf16) -> __m256 {
        unsafe {
            let half = _mm_loadu_si128(source.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    unsafe fn load_even(source: *const [bf16; 2]) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(source.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_odd(source: *const [bf16; 2]) -> __m256 {
        unsafe {
            let pairs = _mm256_loadu_si256(source.cast());
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(!0xffff)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(source: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(source: *const i8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(source.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_lower(source: *const u8) -> __m256 {
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(source.cast()));
            codes(_mm256_and_si256(bytes, _mm256_set1_epi32(15)))
        }
    }
    #[inline(always)]
    unsafe fn load_upper(source: *const u8) -> __m256 {
        unsafe { codes(_mm256_srli_epi32::<4>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(source.cast())))) }
    }
    #[inline(always)]
    unsafe fn four_times(source: *const f32) -> __m256 {
        unsafe { _mm256_set_m128(_mm_set1_ps(*source.add(1)), _mm_set1_ps(*source)) }
    }
    #[inline(always)]
    unsafe fn repeat(four: &[f32; 4]) -> __m256 {
        unsafe { _mm256_broadcast_ps(&_mm_loadu_ps(four.as_ptr())) }
    }
    #[inline(always)]
    unsafe fn store(target: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(target, x) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m256, bound: __m256, value: __m256) -> __m256 {
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, bound), value) }
    }
    #[inline(always)]
    unsafe fn shift_exponent(x: __m256, biased: __m256) -> __m256 {
        unsafe {
            let shift = _mm256_slli_epi32::<23>(_mm256_castps_si256(biased));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shift))
        }
    }
    #[inline(always)]
    unsafe fn sums(x: &[__m256]) -> __m256 {
        unsafe { sums::<false>(x) }
    }
}

// SAFETY of every block: the caller promises the CPU features and the pointers (see `Whole`).
#[allow(clippy::undocumented_unsafe_blocks)]
impl Whole for Avx2 {
    type Bytes = __m128i;
    type Whole = __m256i;

    #[inline(always)]
    unsafe fn load_bytes(source: *const u8) -> __m128i {
        unsafe { _mm_loadu_si128(source.cast()) }
    }
    #[inline(always)]
    unsafe fn load_whole(source: *const i16) -> __m256i {
        unsafe { _mm256_loadu_si256(source.cast()) }
    }
    #[inline(always)]
    unsafe fn interleave(a: __m128i, b: __m128i) -> [__m128i; 2] {
        unsafe { [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)] }
    }
    #[inline(always)]
    unsafe fn signed(bytes: __m128i) -> __m256i {
        unsafe { _mm256_cvtepi8_epi16(bytes) }
    }
    #[inline(always)]
    unsafe fn lower(bytes: __m128i) -> __m256i {
        unsafe { _mm256_and_si256(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi16(15)) }
    }
    #[inline(always)]
    unsafe fn upper(bytes: __m128i) -> __m256i {
        unsafe { _mm256_srli_epi16::<4>(_mm256_cvtepu8_epi16(bytes)) }
    }
    #[inline(always)]
    unsafe fn splat_pair(pair: u32) -> __m256i {
        unsafe { _mm256_set1_epi32(pair.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn none() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn add_products(a: __m256i, b: __m256i, sums: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(_mm256_madd_epi16(a, b), sums) }
    }
    #[inline(always)]
    unsafe fn float(sums: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn totals(x: &[__m256i]) -> __m256 {
        unsafe {
            let sums = sums::<true>(std::slice::from_raw_parts(x.as_ptr().cast(), x.len()));
            Self::float(_mm256_castps_si256(sums))
        }
    }
}

/// `2 n - 15`
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn codes(n: __m256i) -> __m256 {
    unsafe { _mm256_fmadd_ps(_mm256_cvtepi32_ps(n), _mm256_set1_ps(2.0), _mm256_set1_ps(-15.0)) }
}

/// The sums of the lanes of each vector, of floats or of whole numbers.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn sums<const WHOLE: bool>(x: &[__m256]) -> __m256 {
    unsafe {
        let (a, b) = (halves::<WHOLE>(x[0], x[4]), halves::<WHOLE>(x[1], x[5]));
        let (c, d) = (halves::<WHOLE>(x[2], x[6]), halves::<WHOLE>(x[3], x[7]));
        let (e, f) = (quarters::<WHOLE>(a, b), quarters::<WHOLE>(c, d));
        plus::<WHOLE>(_mm256_shuffle_ps::<0x88>(e, f), _mm256_shuffle_ps::<0xdd>(e, f))
    }
}

#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn plus<const WHOLE: bool>(a: __m256, b: __m256) -> __m256 {
    unsafe {
        if WHOLE {
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
        } else {
            _mm256_add_ps(a, b)
        }
    }
}

/// The lower half is the sum of the halves of `a`, the upper one that of `b`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn halves<const WHOLE: bool>(a: __m256, b: __m256) -> __m256 {
    unsafe { plus::<WHOLE>(_mm256_blend_ps::<0xf0>(a, b), _mm256_permute2f128_ps::<0x21>(a, b)) }
}

/// The same within each half: two lanes of `a`, two of `b`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)]
unsafe fn quarters<const WHOLE: bool>(a: __m256, b: __m256) -> __m256 {
    unsafe { plus::<WHOLE>(_mm256_blend_ps::<0xcc>(a, b), _mm256_shuffle_ps::<0x4e>(a, b)) }
}
