//! Plain arrays: any machine. Compilers turn these loops into the baseline's registers (NEON on aarch64, which is
//! untested so far); where the baseline has no fused multiply-add, `mul_add` is a call, correct and slow.

use super::{BYTES, LANES, Simd};
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

/// The nearest integer, ties to even, of a value far smaller than 2^22.
#[inline(always)]
fn rounded(value: f32) -> u32 {
    // Where a float32 has no fraction: the sum is rounded, and its low bits are the integer.
    const MIDDLE: f32 = 1.5 * (1u32 << 23) as f32;
    (value + MIDDLE).to_bits()
}

impl Simd for Portable {
    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Bytes = [u8; BYTES];
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
    fn load_pairs(self, pairs: &[[bf16; 2]; LANES]) -> Self::F32 {
        pairs.map(|[second, first]| {
            f32::from_bits(u32::from(first.to_bits()) << 16 | u32::from(second.to_bits()))
        })
    }
    #[inline(always)]
    fn first_of_pairs(self, pairs: Self::F32) -> Self::F32 {
        pairs.map(|pair| f32::from_bits(pair.to_bits() & 0xffff_0000))
    }
    #[inline(always)]
    fn second_of_pairs(self, pairs: Self::F32) -> Self::F32 {
        pairs.map(|pair| f32::from_bits(pair.to_bits() << 16))
    }
    #[inline(always)]
    fn dot_pairs(self, sum: Self::F32, pairs: Self::F32, [second, first]: [bf16; 2]) -> Self::F32 {
        let sum = self.fma(self.first_of_pairs(pairs), [first.to_f32(); LANES], sum);
        self.fma(self.second_of_pairs(pairs), [second.to_f32(); LANES], sum)
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
    fn sqrt(self, value: [f32; LANES]) -> [f32; LANES] {
        value.map(f32::sqrt)
    }
    #[inline(always)]
    fn transpose(self, rows: [[f32; LANES]; LANES]) -> [[f32; LANES]; LANES] {
        let mut columns = [[0.0; LANES]; LANES];
        for i in 0..LANES {
            for j in 0..LANES {
                columns[j][i] = rows[i][j];
            }
        }
        columns
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
    fn splat_i32(self, value: i32) -> Self::I32 {
        [value; LANES]
    }
    #[inline(always)]
    fn load_i8(self, lanes: &[i8; LANES]) -> Self::I32 {
        lanes.map(i32::from)
    }
    #[inline(always)]
    fn mul_add_i32(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32 {
        let mut out = c;
        for i in 0..LANES {
            out[i] = out[i].wrapping_add(a[i].wrapping_mul(b[i]));
        }
        out
    }
    #[inline(always)]
    fn to_f32(self, value: Self::I32) -> Self::F32 {
        value.map(|value| value as f32)
    }
    #[inline(always)]
    fn as_i32(self, bits: Self::F32) -> Self::I32 {
        bits.map(|bits| bits.to_bits() as i32)
    }
    #[inline(always)]
    fn as_f32(self, bits: Self::I32) -> Self::F32 {
        bits.map(|bits| f32::from_bits(bits as u32))
    }
    #[inline(always)]
    fn load_bytes(self, bytes: &[u8; BYTES]) -> Self::Bytes {
        *bytes
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::Bytes) -> [Self::Bytes; 2] {
        [bytes.map(|byte| table[usize::from(byte & 15)]), bytes.map(|byte| table[usize::from(byte >> 4)])]
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::I32, bytes: Self::Bytes, x: [i8; 4]) -> Self::I32 {
        let mut out = sum;
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            for (&byte, x) in bytes.iter().zip(x) {
                *out = out.wrapping_add(i32::from(byte) * i32::from(x));
            }
        }
        out
    }
    #[inline(always)]
    fn load_i8_pairs(self, pairs: &[[i8; 2]; LANES]) -> Self::I32 {
        pairs.map(|pair| bytemuck::cast(pair.map(i16::from)))
    }
    #[inline(always)]
    fn dot_i16_pairs(self, sum: Self::I32, pairs: Self::I32, x: [i16; 2]) -> Self::I32 {
        let mut out = sum;
        for (out, pair) in out.iter_mut().zip(pairs) {
            let pair: [i16; 2] = bytemuck::cast(pair);
            for (value, x) in pair.into_iter().zip(x) {
                *out = out.wrapping_add(i32::from(value) * i32::from(x));
            }
        }
        out
    }
    #[inline(always)]
    fn round_to_i8(self, value: Self::F32, out: &mut [i8; LANES]) {
        *out = value.map(|value| rounded(value) as i8);
    }
    #[inline(always)]
    fn round_to_i16(self, value: Self::F32, out: &mut [i16; LANES]) {
        *out = value.map(|value| rounded(value) as i16);
    }
    #[inline(always)]
    fn round_to_pairs(self, first: [f32; LANES], second: [f32; LANES], out: &mut [[bf16; 2]; LANES]) {
        for i in 0..LANES {
            out[i] = [bf16::from_f32(second[i]), bf16::from_f32(first[i])];
        }
    }
    #[inline(always)]
    fn round_to_bf16(self, value: Self::F32, out: &mut [bf16; LANES]) {
        *out = value.map(bf16::from_f32);
    }
    #[inline(always)]
    fn prefetch<T>(self, _address: *const T) {}
    #[inline(always)]
    fn prefetch_l2<T>(self, _address: *const T) {}
}
