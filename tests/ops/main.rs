//! Every operation, on every instruction set of this machine, against naive float64 loops.
//!
//! An error bound is derived where it stands, from the roundings on the way to a result: a chain of `n` roundings of
//! unit roundoff u = 2^-24 errs by no more than gamma_n = n u / (1 - n u) times the sum of the terms' magnitudes
//! (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 3). Between instruction sets there is no
//! tolerance: bits are equal.

use bytemuck::Zeroable;
use gpt2rs::mapped::Line;
use gpt2rs::ops::panels::{Format, NR, Panels};
use gpt2rs::simd::Isa;

mod attention;
mod backward;
mod dropout;
mod embed;
mod flash_attention;
#[cfg(target_arch = "x86_64")]
mod floating_point_mode;
mod gelu;
mod gemm;
mod instruction_sets;
mod layernorm;
mod matmul;
mod packing;
mod panels;
mod round;
mod simd;
mod softmax;

/// Unit roundoff of float32.
const UNIT: f64 = 1.0 / (1 << 24) as f64;

/// Bound of the relative error of a chain of `n` roundings.
fn gamma(n: usize) -> f64 {
    let n = n as f64 * UNIT;
    n / (1.0 - n)
}

/// Below this, float32 rounds to multiples of 2^-149, not relative to the value.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// What stands where nothing may be read or written.
const FORBIDDEN: f32 = f32::NAN;

/// The bits of each value, all NaNs the same: IEEE 754 leaves their signs and payloads open.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
}

/// What `compute` gives on every instruction set, which must be the same bits on each.
fn on_every_isa(mut compute: impl FnMut(Isa) -> Vec<f32>) -> Vec<f32> {
    let all = Isa::available();
    let portable = compute(all[0]);
    for &isa in &all[1..] {
        let values = compute(isa);
        if let Some(i) = (0..portable.len()).find(|&i| bits(&values[i..=i]) != bits(&portable[i..=i])) {
            panic!("value {i} is {:e} on {}, {:e} on {}", values[i], isa.name(), portable[i], all[0].name());
        }
        assert_eq!(values.len(), portable.len());
    }
    portable
}

/// Numbers from a seed, the same on every machine (SplitMix64: Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `n` values uniform in -`scale`..`scale`.
    fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.value() * scale).collect()
    }
}

/// Whole cache lines, at whose start packed weights and blocks of a cache begin.
fn lines(bytes: usize) -> Vec<Line> {
    vec![Line::zeroed(); bytes.div_ceil(size_of::<Line>())]
}

/// A (K, N) matrix in panels; columns past the last one hold what may not be used.
fn pack<F: Format>(w: &[f32], k: usize, n: usize) -> Vec<Line> {
    let mut packed = lines(Panels::<F>::packed_len(k, n));
    let panels =
        bytemuck::cast_slice_mut::<Line, u8>(&mut packed).chunks_exact_mut(Panels::<F>::panel_len(k));
    for (i, panel) in panels.enumerate() {
        let mut rows = vec![[0.0; NR]; k.next_multiple_of(F::GROUP)];
        for (row, values) in rows.iter_mut().zip(w.chunks_exact(n)) {
            for (lane, value) in row.iter_mut().enumerate() {
                *value = values.get(i * NR + lane).copied().unwrap_or(FORBIDDEN);
            }
        }
        F::encode(&rows, panel);
    }
    packed
}

/// What a packed matrix stands for: (K, N), row-major.
fn held<F: Format>(panels: Panels<'_, F>) -> Vec<f32> {
    let (k, n) = (panels.k(), panels.n());
    (0..k * n).map(|i| panels.value(i / n, i % n)).collect()
}

/// `rows` rows of `columns` values, `stride` apart, with what may not be read between them.
fn spread(values: &[f32], columns: usize, stride: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len() / columns * stride);
    for row in values.chunks_exact(columns) {
        out.extend_from_slice(row);
        out.resize(out.len() + stride - columns, FORBIDDEN);
    }
    out
}

/// The inverse of [`spread`]; what lies between the rows must be untouched.
fn gather(values: &[f32], columns: usize, stride: usize) -> Vec<f32> {
    let rows = values.chunks_exact(stride);
    rows.flat_map(|row| {
        assert!(
            row[columns..].iter().all(|value| value.to_bits() == FORBIDDEN.to_bits()),
            "written past a row"
        );
        &row[..columns]
    })
    .copied()
    .collect()
}
