//! The exponential, and what is made of it.

use crate::simd::{Isa, Kernel, LANES, Simd, load_partial, store_partial};

/// Below this, `exp` gives zero: its result would be subnormal.
pub const EXP_LOWEST: f32 = -87.336_54;
/// `exp` of anything above gives `exp(EXP_HIGHEST)`, about 2.4e38: it never overflows.
pub const EXP_HIGHEST: f32 = 88.376_26;

/// `exp(x)` in every lane, within 2 units in the last place on `EXP_LOWEST..EXP_HIGHEST`; `exp(0)` is 1 exactly, and a
/// NaN stays one.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial of degree 6 with the least maximum of its relative error
/// (4e-9), fitted for this purpose; 2^n by adding to the exponent's bits.
#[inline(always)]
pub fn exp_lanes<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let highest = simd.splat(EXP_HIGHEST);
    let lowest = simd.splat(EXP_LOWEST);
    let clamped = simd.select_less(highest, x, highest, x);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
    let magic = simd.splat(12_582_912.0);
    let shifted = simd.fma(clamped, simd.splat(std::f32::consts::LOG2_E), magic);
    let n = simd.sub(shifted, magic);
    // ln 2 in two parts, of which the first has so few bits that n times it is exact.
    let r = simd.fma(n, simd.splat(-0.693_359_4), clamped);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    let mut p = simd.splat(1.381_459_2e-3);
    p = simd.fma(p, r, simd.splat(8.368_719e-3));
    p = simd.fma(p, r, simd.splat(4.166_839e-2));
    p = simd.fma(p, r, simd.splat(1.666_652_1e-1));
    p = simd.fma(p, r, simd.splat(4.999_999_4e-1));
    let p = simd.fma(simd.mul(r, r), p, simd.add(r, simd.splat(1.0)));
    let result = simd.select_less(clamped, lowest, simd.splat(0.0), simd.add_exponent(p, shifted));
    // The bits of a NaN would have been added to the exponent.
    simd.select_less(clamped, simd.splat(f32::INFINITY), result, clamped)
}

/// `values[i] = exp(values[i])`, as [`exp_lanes`].
pub fn exp(isa: Isa, values: &mut [f32]) {
    struct Exp<'a>(&'a mut [f32]);
    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let mut start = 0;
            while start < self.0.len() {
                let end = (start + LANES).min(self.0.len());
                let lanes = &mut self.0[start..end];
                let value = exp_lanes(simd, load_partial(simd, lanes));
                store_partial(simd, value, lanes);
                start = end;
            }
        }
    }
    isa.run(Exp(values));
}
