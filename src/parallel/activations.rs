//! The buffers that a pass's operations hand on.

use crate::ops::{Rows, padded_stride};

/// A row-major buffer of activations, its rows padded; it keeps its memory between passes.
#[derive(Default)]
pub struct Activations {
    pub(super) data: Vec<f32>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Activations {
    /// Makes it (rows, columns); what it holds is unspecified, but for a zero after each row of an odd length.
    pub fn shape(&mut self, rows: usize, columns: usize) -> &mut Activations {
        (self.rows, self.columns) = (rows, columns);
        let len = rows * self.stride();
        if self.data.len() < len {
            self.data.resize(len, 0.0);
        }
        if columns % 2 == 1 {
            let stride = self.stride();
            self.data[..len].chunks_exact_mut(stride).for_each(|row| row[columns] = 0.0);
        }
        self
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        self.view().row(i)
    }

    /// Row `i`, to be written.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        let start = i * self.stride();
        &mut self.data[start..start + self.columns]
    }

    pub(super) fn stride(&self) -> usize {
        padded_stride(self.columns)
    }

    pub(super) fn view(&self) -> Rows<'_> {
        Rows::new(&self.data, self.stride(), self.columns)
    }
}
