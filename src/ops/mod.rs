//! GPT-2's operations, one file each. All sums of float32 follow one order, whatever the instruction set, the number of
//! threads or the shape of the batch: see `docs/design.md`, "One answer".

pub mod attention;
pub mod embed;
pub mod gelu;
pub mod layernorm;
pub mod matmul;
pub mod pairs;
pub mod panels;
pub mod round;
pub mod softmax;

use std::ops::Range;

/// Rows of values, `stride` apart, of which the first `columns` are meant.
#[derive(Clone, Copy)]
pub struct Rows<'a, T = f32> {
    data: &'a [T],
    stride: usize,
    columns: usize,
}

impl<'a, T> Rows<'a, T> {
    /// A view of `data`, row-major with rows `stride` apart.
    ///
    /// # Panics
    /// When a row is longer than the stride.
    pub fn new(data: &'a [T], stride: usize, columns: usize) -> Rows<'a, T> {
        assert!(columns <= stride);
        Rows { data, stride, columns }
    }

    /// Values of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Distance from a row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.stride..][..self.columns]
    }

    /// The same rows, columns `range` alone.
    pub fn columns_of(&self, range: Range<usize>) -> Rows<'a, T> {
        assert!(range.end <= self.columns);
        Rows {
            data: &self.data[range.start.min(self.data.len())..],
            stride: self.stride,
            columns: range.len(),
        }
    }

    /// The same columns, from row `start` on.
    pub fn rows_from(&self, start: usize) -> Rows<'a, T> {
        Rows { data: &self.data[(start * self.stride).min(self.data.len())..], ..*self }
    }
}

impl<'a> Rows<'a> {
    /// Values two by two: the stride must be even, and a row of an odd length have a zero behind it.
    pub fn pairs(&self) -> Rows<'a, [f32; 2]> {
        Rows::new(bytemuck::cast_slice(self.data), self.stride / 2, self.columns.div_ceil(2))
    }
}

/// The distance between the rows of an activation buffer of `columns`: whole registers, and an odd number of cache
/// lines, so that the rows of a tile don't fall into the same set of the cache.
pub fn padded_stride(columns: usize) -> usize {
    let lines = columns.div_ceil(16);
    16 * (lines | 1)
}
