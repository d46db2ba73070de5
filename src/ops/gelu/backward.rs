//! The activation functions' derivatives.

use super::{activate, normal_cdf};
use crate::config::Activation;
use crate::ops::Rows;
use crate::ops::softmax::exp_lanes;
use crate::simd::{Kernel, LANES, Simd, load_partial, store_partial};

/// The derivative in every lane; of ReLU at 0, 0.
#[inline(always)]
pub fn derivative<S: Simd>(simd: S, activation: Activation, x: S::F32) -> S::F32 {
    // Beyond, all are 0 or 1, and cubes might overflow. A NaN stays one.
    let (low, high) = (simd.splat(-128.0), simd.splat(128.0));
    let x = simd.max(low, simd.select_less(high, x, high, x));
    match activation {
        Activation::GeluNew => {
            // x sigmoid(u) with u = 2 sqrt(2/pi) (x + 0.044715 x^3).
            const TWICE: f32 = 1.595_769;
            let square = simd.mul(x, x);
            let minus_u = simd.mul(simd.fma(square, simd.splat(-TWICE * 0.044_715), simd.splat(-TWICE)), x);
            let slope = simd.fma(square, simd.splat(3.0 * TWICE * 0.044_715), simd.splat(TWICE));
            times_sigmoid(simd, minus_u, simd.mul(x, slope))
        }
        Activation::Gelu => {
            // x Phi(x): Phi(x) + x exp(-x^2/2) / sqrt(2 pi).
            let bell = exp_lanes(simd, simd.mul(simd.mul(x, x), simd.splat(-0.5)));
            let density = simd.mul(bell, simd.splat(0.398_942_3));
            simd.fma(x, density, normal_cdf(simd, x, bell))
        }
        Activation::Relu => {
            let zero = simd.splat(0.0);
            // Of a NaN, a NaN.
            simd.select_less(zero, x, simd.splat(1.0), simd.mul(x, zero))
        }
        Activation::Silu => times_sigmoid(simd, simd.sub(simd.splat(0.0), x), x),
    }
}

/// The derivative of `x sigmoid(u(x))`, given `-u` and `x u'(x)`: `s + x u' s (1 - s)`.
#[inline(always)]
fn times_sigmoid<S: Simd>(simd: S, minus_u: S::F32, x_slope: S::F32) -> S::F32 {
    let e = exp_lanes(simd, minus_u);
    let s = simd.div(simd.splat(1.0), simd.add(simd.splat(1.0), e));
    // 1 - s without cancellation.
    let rest = simd.mul(e, s);
    simd.fma(simd.mul(x_slope, s), rest, s)
}

/// `out = activation(x)`.
pub struct Activate<'a> {
    /// (rows, columns).
    pub x: Rows<'a>,
    /// Which.
    pub activation: Activation,
    /// As many rows as are wanted, `stride` apart.
    pub out: &'a mut [f32],
    /// Distance between rows of `out`.
    pub stride: usize,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, out) in self.out.chunks_mut(self.stride).enumerate() {
            for (x, out) in self.x.row(i).chunks(LANES).zip(out.chunks_mut(LANES)) {
                let out = &mut out[..x.len()];
                store_partial(simd, activate(simd, self.activation, load_partial(simd, x)), out);
            }
        }
    }
}

/// `d *= activation'(x)`.
pub struct ActivateBackward<'a> {
    /// (rows, columns).
    pub x: Rows<'a>,
    /// Which.
    pub activation: Activation,
    /// As many rows as are wanted, `stride` apart.
    pub d: &'a mut [f32],
    /// Distance between rows of `d`.
    pub stride: usize,
}

impl Kernel for ActivateBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, d) in self.d.chunks_mut(self.stride).enumerate() {
            for (x, d) in self.x.row(i).chunks(LANES).zip(d.chunks_mut(LANES)) {
                let d = &mut d[..x.len()];
                let slope = derivative(simd, self.activation, load_partial(simd, x));
                store_partial(simd, simd.mul(load_partial(simd, d), slope), d);
            }
        }
    }
}
