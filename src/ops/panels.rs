//! How weights lie in memory: a matrix (K, N) in panels of [`NR`] columns, a panel in groups along K.
//!
//! A panel is one stretch of memory, so a decoded token streams it; the same stretch feeds a prompt's register tiles.
//! The groups' bytes depend on the [`Format`]; rows missing from the last group, and columns missing from the last
//! panel, are zeros. A group of float32 or bfloat16 is a step of [`super::pairs`] for 16 columns and one for the next 16.

mod int4;

use super::pairs::{Bf16, Bf16Dots, F32};
use crate::simd::LANES;
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a panel.
pub const NR: usize = 32;

/// A way to hold weights.
pub trait Format: Copy + Send + Sync + 'static {
    /// Rows of a group.
    const GROUP: usize;
    /// Bytes of a group: whole cache lines.
    const GROUP_BYTES: usize;
    /// Bytes that follow a panel's groups: whole cache lines.
    const PANEL_BYTES: usize = 0;
    /// Writes a panel of whole groups of rows.
    fn encode(rows: &[[f32; NR]], panel: &mut [u8]) {
        let groups = panel.chunks_exact_mut(Self::GROUP_BYTES);
        for (rows, group) in rows.chunks_exact(Self::GROUP).zip(groups) {
            Self::encode_group(rows, group);
        }
    }
    /// Writes a group of rows, in formats whose panels are nothing but groups.
    fn encode_group(rows: &[[f32; NR]], group: &mut [u8]);
    /// What a panel holds at row `k` of a column.
    fn value(panel: &[u8], k: usize, column: usize) -> f32;
}

/// Bytes with a bfloat16 scale for each column of 32 rows: `(byte - 128) * scale`. Four rows lie side by side, then the
/// next columns, then the next four rows; the scales come before them.
#[derive(Clone, Copy)]
pub struct Int8Groups;

/// Half bytes: `LEVELS[half byte] * scale * factor`, with an int8 scale for each column of 16 rows, and a float32 factor
/// for each column. Of eight rows, four lie in the bytes' lower halves and four in the upper ones; else as [`Int8Groups`].
/// A group, 64 rows, begins with its four scales of each column, and a panel ends with its factors.
#[derive(Clone, Copy)]
pub struct Int4Groups;

/// What is added to an integer weight, so that it is an unsigned byte.
pub const ZERO: i32 = 128;

impl Format for F32 {
    const GROUP: usize = 2;
    const GROUP_BYTES: usize = 8 * NR;

    fn encode_group(rows: &[[f32; NR]], group: &mut [u8]) {
        let steps: &mut [[[f32; LANES]; 2]] = bytemuck::cast_slice_mut(group);
        for (register, step) in steps.iter_mut().enumerate() {
            for (out, row) in step.iter_mut().zip(rows) {
                *out = row.as_chunks().0[register];
            }
        }
    }

    fn value(panel: &[u8], k: usize, column: usize) -> f32 {
        let values: &[f32] = bytemuck::cast_slice(panel);
        values[k / 2 * 2 * NR + column / LANES * 2 * LANES + k % 2 * LANES + column % LANES]
    }
}

impl Format for Bf16 {
    const GROUP: usize = 2;
    const GROUP_BYTES: usize = 4 * NR;

    fn encode_group(rows: &[[f32; NR]], group: &mut [u8]) {
        let pairs: &mut [[bf16; 2]] = bytemuck::cast_slice_mut(group);
        for (pair, (&first, &second)) in pairs.iter_mut().zip(rows[0].iter().zip(&rows[1])) {
            *pair = [bf16::from_f32(second), bf16::from_f32(first)];
        }
    }

    fn value(panel: &[u8], k: usize, column: usize) -> f32 {
        let pairs: &[[bf16; 2]] = bytemuck::cast_slice(panel);
        pairs[k / 2 * NR + column][1 - k % 2].to_f32()
    }
}

impl Format for Bf16Dots {
    const GROUP: usize = Bf16::GROUP;
    const GROUP_BYTES: usize = Bf16::GROUP_BYTES;

    fn encode_group(rows: &[[f32; NR]], group: &mut [u8]) {
        Bf16::encode_group(rows, group);
    }

    fn value(panel: &[u8], k: usize, column: usize) -> f32 {
        Bf16::value(panel, k, column)
    }
}

impl Format for Int8Groups {
    const GROUP: usize = 32;
    const GROUP_BYTES: usize = (32 + 2) * NR;

    fn encode_group(rows: &[[f32; NR]], group: &mut [u8]) {
        let (scales, values) = group.split_at_mut(2 * NR);
        let mut inverse = [0.0; NR];
        for (column, scale) in bytemuck::cast_slice_mut::<u8, bf16>(scales).iter_mut().enumerate() {
            *scale = bf16::from_f32(greatest(rows, column) / 127.0);
            inverse[column] = reciprocal(scale.to_f32());
        }
        for (four, values) in rows.chunks_exact(4).zip(values.as_chunks_mut::<{ 4 * NR }>().0) {
            for (row, weights) in four.iter().enumerate() {
                for column in 0..NR {
                    values[4 * column + row] = byte(weights[column] * inverse[column]);
                }
            }
        }
    }

    fn value(panel: &[u8], k: usize, column: usize) -> f32 {
        let group = &panel[k / Self::GROUP * Self::GROUP_BYTES..][..Self::GROUP_BYTES];
        let (scales, values) = group.split_at(2 * NR);
        let k = k % Self::GROUP;
        let byte = values[(k / 4 * NR + column) * 4 + k % 4];
        let scales: &[bf16] = bytemuck::cast_slice(scales);
        (i32::from(byte) - ZERO) as f32 * scales[column].to_f32()
    }
}

/// The greatest magnitude in a column, NaN where a value is not finite.
fn greatest(rows: &[[f32; NR]], column: usize) -> f32 {
    let mut greatest = 0.0_f32;
    let mut finite = true;
    for row in rows {
        greatest = greatest.max(row[column].abs());
        finite &= row[column].is_finite();
    }
    if finite { greatest } else { f32::NAN }
}

/// `1 / scale`, 0 where that is no number to work with: values too small to be told from zero, or not finite.
fn reciprocal(scale: f32) -> f32 {
    let reciprocal = 1.0 / scale;
    if reciprocal.is_finite() { reciprocal } else { 0.0 }
}

/// The nearest integer, ties to even, within -127..=127, as an unsigned byte; NaN as zero.
fn byte(value: f32) -> u8 {
    const MIDDLE: f32 = 1.5 * (1u32 << 23) as f32;
    let integer = (value.clamp(-127.0, 127.0) + MIDDLE).to_bits() as u8;
    if value.is_nan() { ZERO as u8 } else { integer.wrapping_add(ZERO as u8) }
}

/// A packed (K, N) matrix.
#[derive(Clone, Copy)]
pub struct Panels<'a, F> {
    data: &'a [u8],
    k: usize,
    n: usize,
    format: PhantomData<F>,
}

impl<'a, F: Format> Panels<'a, F> {
    /// Bytes of a panel of k rows.
    pub fn panel_len(k: usize) -> usize {
        k.div_ceil(F::GROUP) * F::GROUP_BYTES + F::PANEL_BYTES
    }

    /// Bytes that a packed (k, n) matrix takes.
    pub fn packed_len(k: usize, n: usize) -> usize {
        Self::panel_len(k) * n.div_ceil(NR)
    }

    /// A view of packed data, which starts at a cache line.
    ///
    /// # Panics
    /// When the length is not that of a (k, n) matrix.
    pub fn new(data: &'a [u8], k: usize, n: usize) -> Panels<'a, F> {
        assert_eq!(data.len(), Self::packed_len(k, n));
        Panels { data, k, n, format: PhantomData }
    }

    /// Rows of the matrix: the inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the matrix: the outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Groups of a panel.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(F::GROUP)
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.n.div_ceil(NR)
    }

    /// The columns that lie in panel `index`.
    pub fn columns(&self, index: usize) -> Range<usize> {
        (index * NR).min(self.n)..((index + 1) * NR).min(self.n)
    }

    /// Panel `index`.
    #[inline(always)]
    pub fn panel(&self, index: usize) -> &'a [u8] {
        let bytes = Self::panel_len(self.k);
        &self.data[index * bytes..][..bytes]
    }

    /// What row `k` has in column `n`.
    pub fn value(&self, k: usize, n: usize) -> f32 {
        assert!(k < self.k && n < self.n);
        F::value(self.panel(n / NR), k, n % NR)
    }
}
