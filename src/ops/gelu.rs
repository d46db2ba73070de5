//! The activation functions of the family. Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.

pub mod backward;

use super::softmax::exp_lanes;
use crate::config::Activation;
use crate::simd::{LANES, Simd};

/// The activation in every lane.
#[inline(always)]
pub fn activate<S: Simd>(simd: S, activation: Activation, x: S::F32) -> S::F32 {
    match activation {
        Activation::GeluNew => gelu_new(simd, x),
        Activation::Gelu => gelu(simd, x),
        // In this order a NaN stays one.
        Activation::Relu => simd.max(simd.splat(0.0), x),
        Activation::Silu => x_over_one_plus_exp(simd, x, simd.sub(simd.splat(0.0), x)),
    }
}

/// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, written as `x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))`.
#[inline(always)]
fn gelu_new<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    const TWICE: f32 = 1.595_769; // 2 sqrt(2/pi)
    let square = simd.mul(x, x);
    let inner = simd.fma(square, simd.splat(-TWICE * 0.044_715), simd.splat(-TWICE));
    x_over_one_plus_exp(simd, x, simd.mul(inner, x))
}

#[inline(always)]
fn x_over_one_plus_exp<S: Simd>(simd: S, x: S::F32, exponent: S::F32) -> S::F32 {
    simd.div(x, simd.add(simd.splat(1.0), exp_lanes(simd, exponent)))
}

/// `x Phi(x)`, Phi the normal distribution function, to a relative error of 1e-6 for x > -5 (below, the exponential's
/// argument is rounded: 1e-5 at x = -12).
///
/// Phi(-|x|) = exp(-x^2/2) t Q(t), t = 1 / (1 + 0.2316419 |x|): the form of Abramowitz and Stegun 26.2.17, with a
/// polynomial of degree 7 fitted to a relative error of 1.5e-7 on |x| <= 14.5.
#[inline(always)]
fn gelu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let bell = exp_lanes(simd, simd.mul(simd.mul(x, x), simd.splat(-0.5)));
    simd.mul(x, normal_cdf(simd, x, bell))
}

/// Phi(x), given `exp(-x^2/2)`.
#[inline(always)]
fn normal_cdf<S: Simd>(simd: S, x: S::F32, bell: S::F32) -> S::F32 {
    const Q: [f32; 8] = [
        9.251_665e-2,
        9.049_933e-2,
        1.021_885_7e-1,
        1.499_010_3e-2,
        2.226_638_3e-1,
        -1.989_591e-1,
        2.461_713_6e-1,
        -7.007_066e-2,
    ];
    let zero = simd.splat(0.0);
    let one = simd.splat(1.0);
    let magnitude = simd.max(x, simd.sub(zero, x));
    let t = simd.div(one, simd.fma(magnitude, simd.splat(0.231_641_9), one));
    let mut q = simd.splat(Q[7]);
    for &coefficient in Q[..7].iter().rev() {
        q = simd.fma(q, t, simd.splat(coefficient));
    }
    let tail = simd.mul(simd.mul(t, q), bell);
    simd.select_less(x, zero, tail, simd.sub(one, tail))
}

/// The activation of every value, in place.
pub fn activate_all(isa: crate::simd::Isa, activation: Activation, values: &mut [f32]) {
    struct All<'a>(Activation, &'a mut [f32]);
    impl crate::simd::Kernel for All<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for lanes in self.1.chunks_mut(LANES) {
                let value = activate(simd, self.0, crate::simd::load_partial(simd, lanes));
                crate::simd::store_partial(simd, value, lanes);
            }
        }
    }
    isa.run(All(activation, values));
}
