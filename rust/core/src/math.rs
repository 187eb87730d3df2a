//! e^x and the softcap by a polynomial, on whole vectors.

use crate::simd::Simd;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
// ln 2 in two parts: the first has few bits, so that n * LN_2_HIGH is exact for the n at hand.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// Below this, e^x would be subnormal and is taken as 0.
const LOWEST: f32 = -87.0;

/// e^x for x <= 88, within 2 units in the last place; 0 below -87, not a number stays so.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor polynomial of degree 7, whose error there is below 6e-9.
///
/// # Safety
/// The CPU must have the features of `S`.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::Vector) -> S::Vector {
    // SAFETY: the caller's promise; no memory is touched.
    unsafe {
        let clamped = S::max(S::splat(LOWEST), x);
        let rounded = S::fma(clamped, S::splat(LOG2_E), S::splat(ROUND));
        let n = S::sub(rounded, S::splat(ROUND));
        let r = S::fma(n, S::splat(-LN_2_HIGH), clamped);
        let r = S::fma(n, S::splat(-LN_2_LOW), r);
        let mut e = S::splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            e = S::fma(e, r, S::splat(coefficient));
        }
        S::zero_below(x, S::splat(LOWEST), S::shift_exponent(e, rounded))
    }
}

/// c tanh(x / c), from tanh y = 1 - 2 / (e^{2y} + 1).
///
/// # Safety
/// The CPU must have the features of `S`.
#[inline(always)]
pub(crate) unsafe fn softcap<S: Simd>(x: S::Vector, cap: f32) -> S::Vector {
    // SAFETY: the caller's promise; no memory is touched.
    unsafe {
        let y = S::mul(x, S::splat(2.0 / cap));
        // tanh is 1 to the last bit beyond 2y = 30; -max(-y, -30) is min(y, 30) and keeps what is not a number.
        let y = S::mul(S::max(S::splat(-30.0), S::mul(y, S::splat(-1.0))), S::splat(-1.0));
        let ratio = S::div(S::splat(2.0), S::add(exp::<S>(y), S::splat(1.0)));
        S::mul(S::sub(S::splat(1.0), ratio), S::splat(cap))
    }
}

/// [`softcap`] for one number.
pub(crate) fn softcap_scalar(x: f32, cap: Option<f32>) -> f32 {
    cap.map_or(x, |cap| cap * (x / cap).tanh())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::portable::Portable;

    fn lanes(f: impl Fn([f32; 8]) -> [f32; 8], x: f32) -> f32 {
        f([x; 8])[0]
    }

    #[test]
    fn exp_is_close_to_the_true_one() {
        for step in 0..200_000 {
            let x = -86.9 + step as f32 * 8.7e-4;
            // SAFETY: portable.
            let found = lanes(|v| unsafe { exp::<Portable>(v) }, x);
            let truth = f64::from(x).exp();
            assert!((f64::from(found) / truth - 1.0).abs() < 3e-7, "exp({x}) = {found}");
        }
    }

    #[test]
    fn exp_of_the_edges() {
        // SAFETY: portable.
        let exp = |x| lanes(|v| unsafe { exp::<Portable>(v) }, x);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn softcap_is_close_to_the_true_one() {
        for step in -4000..4000 {
            let x = step as f32 * 0.1;
            // SAFETY: portable.
            let found = lanes(|v| unsafe { softcap::<Portable>(v, 30.0) }, x);
            let truth = 30.0 * (f64::from(x) / 30.0).tanh();
            assert!((f64::from(found) - truth).abs() < 8e-6, "softcap({x}) = {found}");
        }
    }
}
