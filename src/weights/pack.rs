//! Values -> panels: every matrix into its place of one allocation, on all threads.

use super::{Dtype, packed_len};
use crate::checkpoint::Tensor;
use crate::error::Result;
use crate::mapped::Slab;
use crate::ops::pairs::{Bf16, F32};
use crate::ops::panels::{Format, Int4Groups, Int8Groups, NR};
use crate::philox::Normal;
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
    fn read(&self, rows: Range<usize>, row_len: usize, out: &mut [f32]) -> Result<()> {
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
        /// Stored rows are read in pieces of about this many values.
        const PIECE: usize = 128 << 10;
        let Planned { values, k, n, by_column, .. } = self.planned;
        let (k, n) = (*k, *n);
        let panel_bytes = k.div_ceil(F::GROUP) * F::GROUP_BYTES;
        let mut rows = vec![[0.0; NR]; F::GROUP];
        if *by_column {
            for (i, panel) in self.out.chunks_exact_mut(panel_bytes).enumerate() {
                let first = (self.first_panel + i) * NR;
                let columns = first..(first + NR).min(n);
                scratch.resize(columns.len() * k, 0.0);
                values.read(columns, k, scratch)?;
                for (g, group) in panel.chunks_exact_mut(F::GROUP_BYTES).enumerate() {
                    rows.fill([0.0; NR]);
                    for (lane, column) in scratch.chunks_exact(k).enumerate() {
                        for (row, &value) in rows.iter_mut().zip(&column[g * F::GROUP..]) {
                            row[lane] = value;
                        }
                    }
                    F::encode(&rows, group);
                }
            }
            return Ok(());
        }
        let rows_at_once = (PIECE / n).max(1).next_multiple_of(F::GROUP);
        for first in (0..k).step_by(rows_at_once) {
            let piece = first..(first + rows_at_once).min(k);
            scratch.resize(piece.len() * n, 0.0);
            values.read(piece.clone(), n, scratch)?;
            for (i, panel) in self.out.chunks_exact_mut(panel_bytes).enumerate() {
                let columns = i * NR..(i * NR + NR).min(n);
                let groups = panel[first / F::GROUP * F::GROUP_BYTES..].chunks_exact_mut(F::GROUP_BYTES);
                for (group, stored) in groups.zip(scratch.chunks(F::GROUP * n)) {
                    rows.fill([0.0; NR]);
                    for (row, stored) in rows.iter_mut().zip(stored.chunks_exact(n)) {
                        row[..columns.len()].copy_from_slice(&stored[columns.clone()]);
                    }
                    F::encode(&rows, group);
                }
            }
        }
        Ok(())
    }
}
