//! Values -> panels: every matrix into its place of one allocation, on all threads.

use super::{Dtype, packed_len};
use crate::checkpoint::Tensor;
use crate::error::Result;
use crate::mapped::Slab;
use crate::ops::pairs::{Bf16, F32};
use crate::ops::panels::{Format, Int4Groups, Int8Groups, NR, Panels};
use crate::philox::Normal;
use crate::simd::LANES;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The values of one tensor, before they are packed.
pub enum Values<'a> {
    /// Those of a checkpoint.
    Tensor(&'a Tensor),
    /// Normally distributed with this standard deviation.
    Normal(Normal),
    /// All the same.
    Constant(f32),
    /// A matrix that is packed already, for [`Planned`] alone.
    Packed(Slab),
}

impl Values<'_> {
    /// Reads rows as they are stored.
    pub fn read(&self, rows: Range<usize>, row_len: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Values::Tensor(tensor) => tensor.read_rows(rows, out)?,
            Values::Normal(normal) => normal.fill((rows.start * row_len) as u64, out),
            Values::Constant(value) => out.fill(*value),
            Values::Packed(_) => unreachable!("packed values are not read"),
        }
        Ok(())
    }

    /// All `len` values, of rows of `row_len`.
    pub fn vector(&self, len: usize, row_len: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; len];
        self.read(0..len / row_len, row_len, &mut out)?;
        Ok(out)
    }
}

/// A matrix to be packed, and its place in the arena.
pub struct Planned<'a> {
    /// What is packed.
    pub values: Values<'a>,
    /// Rows.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// Whether a stored row is a column of the matrix.
    pub by_column: bool,
    /// What it is packed as.
    pub dtype: Dtype,
    /// What its rows are multiplied by, or empty.
    pub scales: Vec<f32>,
    /// By how many values its columns are rotated, after that.
    pub rotation: usize,
    /// First byte of its place.
    pub start: usize,
}

impl Planned<'_> {
    /// Bytes that it takes in the arena.
    pub fn len(&self) -> usize {
        match self.values {
            Values::Packed(_) => 0,
            _ => packed_len(self.dtype, self.k, self.n),
        }
    }
}

/// Panels of one matrix that one thread fills; a matrix whose stored rows run across the panels is one task.
struct Task<'a> {
    planned: &'a Planned<'a>,
    first_panel: usize,
    out: &'a mut [u8],
}

/// Fills the places of all matrices. Threads take tasks as they come, and the first error ends them all.
pub fn pack_all(planned: &[Planned<'_>], bytes: &mut [u8], n_threads: usize) -> Result<()> {
    /// Panels of a task of a matrix stored by columns.
    const PANELS: usize = 64;
    let mut rest = bytes;
    let mut tasks = Vec::new();
    for planned in planned {
        let (out, after) = rest.split_at_mut(planned.len());
        rest = after;
        let panels = if planned.by_column { PANELS } else { planned.n.div_ceil(NR) };
        let bytes = panels * packed_len(planned.dtype, planned.k, NR);
        for (i, out) in out.chunks_mut(bytes).enumerate() {
            tasks.push(Mutex::new(Some(Task { planned, first_panel: i * panels, out })));
        }
    }
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        let mut scratch = Vec::new();
        while let Some(slot) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            let task = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Err(error)) = task.map(|task| task.pack(&mut scratch)) {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                next.store(tasks.len(), Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..n_threads.min(tasks.len()) {
            scope.spawn(work);
        }
        work();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

impl Task<'_> {
    fn pack(self, scratch: &mut Vec<f32>) -> Result<()> {
        match self.planned.dtype {
            Dtype::F32 => self.pack_as::<F32>(scratch),
            Dtype::BF16 => self.pack_as::<Bf16>(scratch),
            Dtype::Int8 => self.pack_as::<Int8Groups>(scratch),
            Dtype::Int4 => self.pack_as::<Int4Groups>(scratch),
        }
    }

    fn pack_as<F: Format>(self, scratch: &mut Vec<f32>) -> Result<()> {
        let &Planned { ref values, k, n, by_column, ref scales, rotation, .. } = self.planned;
        if !by_column {
            scratch.resize(k * n, 0.0);
            values.read(0..k, n, scratch)?;
        }
        let mut rows = vec![[0.0; NR]; k.next_multiple_of(F::GROUP)];
        for (i, panel) in self.out.chunks_exact_mut(Panels::<F>::panel_len(k)).enumerate() {
            let first = (self.first_panel + i) * NR;
            let columns = first..(first + NR).min(n);
            rows.fill([0.0; NR]);
            if by_column {
                scratch.resize(columns.len() * k, 0.0);
                values.read(columns, k, scratch)?;
                for (lane, column) in scratch.chunks_exact(k).enumerate() {
                    for (row, &value) in rows.iter_mut().zip(column) {
                        row[lane] = value;
                    }
                }
            } else {
                for (row, stored) in rows.iter_mut().zip(scratch.chunks_exact(n)) {
                    row[..columns.len()].copy_from_slice(&stored[columns.clone()]);
                }
            }
            for (row, scale) in rows.iter_mut().zip(scales) {
                row.iter_mut().for_each(|value| *value *= scale);
            }
            rotate(rotation, &mut rows[..k]);
            F::encode(&rows, panel);
        }
        Ok(())
    }
}

/// Rotates the columns as activations will be: see [`crate::ops::round::rotate`].
fn rotate(n: usize, rows: &mut [[f32; NR]]) {
    if n == 1 {
        return;
    }
    let scale = 1.0 / (n as f32).sqrt();
    for block in rows.chunks_exact_mut(n * LANES) {
        let mut half = LANES;
        while half < block.len() {
            for pair in block.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.as_flattened_mut().iter_mut().zip(b.as_flattened_mut()) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        block.as_flattened_mut().iter_mut().for_each(|value| *value *= scale);
    }
}
