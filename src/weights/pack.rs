//! Values -> panels: every matrix into its place of one allocation, on all threads.

use crate::checkpoint::Tensor;
use crate::error::Result;
use crate::ops::matmul::{NR, Panels};
use crate::philox::Normal;
use crate::simd::Element;
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
}

impl Values<'_> {
    /// Reads rows as they are stored.
    fn read(&self, rows: Range<usize>, row_len: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Values::Tensor(tensor) => tensor.read_rows(rows, out)?,
            Values::Normal(normal) => normal.fill((rows.start * row_len) as u64, out),
            Values::Constant(value) => out.fill(*value),
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
    /// First byte of its place.
    pub start: usize,
}

/// Panels of one matrix that one thread fills; a matrix whose stored rows run across the panels is one task.
struct Task<'a, W> {
    planned: &'a Planned<'a>,
    first_column: usize,
    out: &'a mut [W],
}

/// Fills the places of all matrices. Threads take tasks as they come, and the first error ends them all.
pub fn pack_all<W: Element>(planned: &[Planned<'_>], bytes: &mut [u8], n_threads: usize) -> Result<()> {
    /// Columns of a task of a matrix stored by columns.
    const COLUMNS: usize = 64 * NR;
    let mut rest: &mut [W] = bytemuck::cast_slice_mut(bytes);
    let mut tasks = Vec::new();
    for planned in planned {
        let (out, after) = rest.split_at_mut(Panels::<W>::packed_len(planned.k, planned.n));
        rest = after;
        let columns = if planned.by_column { COLUMNS } else { usize::MAX / planned.k.max(1) };
        for (i, out) in out.chunks_mut(columns * planned.k).enumerate() {
            tasks.push(Mutex::new(Some(Task { planned, first_column: i * columns, out })));
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

impl<W: Element> Task<'_, W> {
    fn pack(self, scratch: &mut Vec<f32>) -> Result<()> {
        /// Stored rows are read in pieces of about this many values.
        const PIECE: usize = 128 << 10;
        let Planned { values, k, n, by_column, .. } = self.planned;
        let (k, n) = (*k, *n);
        if *by_column {
            for (i, panel) in self.out.chunks_exact_mut(k * NR).enumerate() {
                let first = self.first_column + i * NR;
                let columns = first..(first + NR).min(n);
                scratch.resize(columns.len() * k, 0.0);
                values.read(columns, k, scratch)?;
                for (lane, column) in scratch.chunks_exact(k).enumerate() {
                    for (row, &value) in panel.as_chunks_mut::<NR>().0.iter_mut().zip(column) {
                        row[lane] = W::from_f32(value);
                    }
                }
            }
            return Ok(());
        }
        let rows_at_once = (PIECE / n).max(1);
        for first in (0..k).step_by(rows_at_once) {
            let rows = first..(first + rows_at_once).min(k);
            scratch.resize(rows.len() * n, 0.0);
            values.read(rows.clone(), n, scratch)?;
            for (i, panel) in self.out.chunks_exact_mut(k * NR).enumerate() {
                let columns = i * NR..(i * NR + NR).min(n);
                let panel = panel.as_chunks_mut::<NR>().0;
                for (out, row) in panel[rows.clone()].iter_mut().zip(scratch.chunks_exact(n)) {
                    for (out, &value) in out.iter_mut().zip(&row[columns.clone()]) {
                        *out = W::from_f32(value);
                    }
                }
            }
        }
        Ok(())
    }
}
