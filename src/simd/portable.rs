//! Plain arrays: any machine. Compilers turn these loops into the baseline's registers (NEON on aarch64, which is
//! untested so far); where the baseline has no fused multiply-add, `mul_add` is a call, correct and slow.

use super::{LANES, Simd};
use half::bf16;

/// Any machine.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

#[inline(always)]
fn tree(mut v: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
    }
    v[0]
}

impl Simd for Portable {
    type F32 = [f32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, lanes: &[f32; LANES]) -> Self::F32 {
        *lanes
    }
    #[inline(always)]
    fn load_bf16(self, lanes: &[bf16; LANES]) -> Self::F32 {
        lanes.map(|v| f32::from_bits(u32::from(v.to_bits()) << 16))
    }
    #[inline(always)]
    fn store(self, value: Self::F32, lanes: &mut [f32; LANES]) {
        *lanes = value;
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        let mut out = c;
        for i in 0..LANES {
            out[i] = a[i].mul_add(b[i], out[i]);
        }
        out
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn select_less(self, a: Self::F32, b: Self::F32, then: Self::F32, otherwise: Self::F32) -> Self::F32 {
        let mut out = otherwise;
        for i in 0..LANES {
            if a[i] < b[i] {
                out[i] = then[i];
            }
        }
        out
    }
    #[inline(always)]
    fn add_exponent(self, value: Self::F32, n: Self::F32) -> Self::F32 {
        zip(value, n, |value, n| f32::from_bits(value.to_bits().wrapping_add(n.to_bits() << 23)))
    }
    #[inline(always)]
    fn reduce_add(self, value: Self::F32) -> f32 {
        tree(value, |a, b| a + b)
    }
    #[inline(always)]
    fn reduce_max(self, value: Self::F32) -> f32 {
        tree(value, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn prefetch<T>(self, _address: *const T) {}
    #[inline(always)]
    fn prefetch_l2<T>(self, _address: *const T) {}
}
