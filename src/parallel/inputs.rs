//! What a product's activations are made into first: normalised, and rounded to what its weights are multiplied with.

use super::{Activations, How};
use crate::config::Precision;
use crate::ops::layernorm::LayerNorm;
use crate::ops::matmul::{Quantised, Steps};
use crate::ops::panels::{Int4Groups, Int8Groups};
use crate::ops::round::{QuantiseRows, RoundRows};
use crate::ops::{Rows, padded_stride};
use crate::pool::share;
use crate::weights::{Dtype, Matrix, Norm};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// A product's activations as they come: to be normalised, or not.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    x: Rows<'a>,
    pub(super) rows: usize,
    norm: Option<(&'a Norm, f32)>,
}

impl<'a> Source<'a> {
    /// A norm comes with the addend to its variance.
    pub(super) fn new(x: &'a Activations, norm: Option<(&'a Norm, f32)>) -> Source<'a> {
        Source { x: x.view(), rows: x.rows, norm }
    }

    /// Some of the rows.
    pub(super) fn part(&self, rows: Range<usize>) -> Source<'a> {
        Source { x: self.x.rows_from(rows.start), rows: rows.len(), norm: self.norm }
    }
}

/// Room for a product's inputs.
#[derive(Default)]
pub(super) struct Inputs {
    normed: Activations,
    pairs: Vec<[bf16; 2]>,
    values: Vec<[[i8; 4]; 2]>,
    scales: Vec<f32>,
    starts: Vec<i32>,
}

/// Some rows of it, to be filled.
pub(super) struct InputRows<'a> {
    how: How,
    source: Source<'a>,
    normed: &'a mut [f32],
    into: Into<'a>,
}

/// What comes after the norm.
enum Into<'a> {
    /// Nothing.
    Floats,
    Rounded {
        out: &'a mut [[bf16; 2]],
        stride: usize,
    },
    Int8(Groups<'a, Int8Groups>),
    Int4(Groups<'a, Int4Groups>),
}

struct Groups<'a, F> {
    rotation: usize,
    values: &'a mut [i8],
    scales: &'a mut [f32],
    starts: &'a mut [i32],
    format: PhantomData<F>,
}

/// What a row of `columns` takes: steps of eight values, groups and integer sums.
struct Sizes {
    steps: usize,
    groups: usize,
    sums: usize,
}

impl Sizes {
    fn of<F: Steps>(columns: usize) -> Sizes {
        let groups = columns.div_ceil(F::GROUP);
        Sizes { steps: groups * F::GROUP / 8, groups, sums: groups * F::GROUP / F::SUM }
    }
}

impl Inputs {
    /// Room for the inputs of a product with `w`, cut by rows into `n` parts.
    pub(super) fn split<'a>(
        &'a mut self,
        how: How,
        source: Source<'a>,
        w: &Matrix,
        n: usize,
    ) -> Vec<InputRows<'a>> {
        let Source { x, rows, norm } = source;
        let columns = x.columns();
        let mut normed = &mut [][..];
        let mut normed_stride = 0;
        if norm.is_some() {
            let shaped = self.normed.shape(rows, columns);
            normed_stride = shaped.stride();
            normed = &mut shaped.data[..rows * normed_stride];
        }
        let rounds = w.dtype() == Dtype::BF16 && how.precision == Precision::Fast;
        let pair_stride = if rounds { padded_stride(columns) / 2 } else { 0 };
        let sizes = match w.dtype() {
            Dtype::Int8 => Sizes::of::<Int8Groups>(columns),
            Dtype::Int4 => Sizes::of::<Int4Groups>(columns),
            Dtype::F32 | Dtype::BF16 => Sizes { steps: 0, groups: 0, sums: 0 },
        };
        let mut pairs = grown(&mut self.pairs, rows * pair_stride);
        let mut values: &mut [i8] = bytemuck::cast_slice_mut(grown(&mut self.values, rows * sizes.steps));
        let mut scales = grown(&mut self.scales, rows * sizes.groups);
        let mut starts = grown(&mut self.starts, rows * sizes.sums);
        let mut parts = Vec::with_capacity(n);
        for i in 0..n {
            let rows = share(rows, n, i);
            let rotation = w.rotation();
            let values = values.split_off_mut(..rows.len() * sizes.steps * 8).expect("so many rows");
            let scales = scales.split_off_mut(..rows.len() * sizes.groups).expect("so many rows");
            let starts = starts.split_off_mut(..rows.len() * sizes.sums).expect("so many rows");
            let out = pairs.split_off_mut(..rows.len() * pair_stride).expect("so many rows");
            let into = match w.dtype() {
                Dtype::BF16 if rounds => Into::Rounded { out, stride: pair_stride },
                Dtype::F32 | Dtype::BF16 => Into::Floats,
                Dtype::Int8 => Into::Int8(Groups { rotation, values, scales, starts, format: PhantomData }),
                Dtype::Int4 => Into::Int4(Groups { rotation, values, scales, starts, format: PhantomData }),
            };
            let normed = normed.split_off_mut(..rows.len() * normed_stride).expect("so many rows");
            parts.push(InputRows { how, source: source.part(rows), normed, into });
        }
        parts
    }

    /// The source, or what it was normalised to, two by two.
    pub(super) fn floats<'a>(&'a self, source: Source<'a>) -> Rows<'a, [f32; 2]> {
        if source.norm.is_some() { self.normed.view().pairs() } else { source.x.pairs() }
    }

    /// Rounded to bfloat16.
    pub(super) fn rounded(&self, source: Source<'_>) -> Rows<'_, [bf16; 2]> {
        let columns = source.x.columns();
        Rows::new(&self.pairs, padded_stride(columns) / 2, columns.div_ceil(2))
    }

    /// In int8 groups.
    pub(super) fn quantised<F: Steps>(&self, source: Source<'_>) -> Quantised<'_> {
        let Sizes { steps, groups, sums } = Sizes::of::<F>(source.x.columns());
        Quantised {
            values: Rows::new(&self.values, steps, steps),
            scales: Rows::new(&self.scales, groups, groups),
            starts: Rows::new(&self.starts, sums, sums),
        }
    }
}

impl InputRows<'_> {
    /// Computes them.
    pub(super) fn fill(self) {
        let InputRows { how, source: Source { mut x, rows, norm }, normed, into } = self;
        if rows == 0 {
            return;
        }
        if let Some((Norm { weight, bias }, eps)) = norm {
            let out_stride = padded_stride(x.columns());
            how.isa.run(LayerNorm { x, weight, bias, eps, out: &mut *normed, out_stride });
            x = Rows::new(normed, out_stride, x.columns());
        }
        match into {
            Into::Floats => {}
            Into::Rounded { out, stride } => how.isa.run(RoundRows { x, rows, out, stride }),
            Into::Int8(groups) => groups.fill(how, x, rows),
            Into::Int4(groups) => groups.fill(how, x, rows),
        }
    }
}

impl<F: Steps> Groups<'_, F> {
    fn fill(self, how: How, x: Rows<'_>, rows: usize) {
        let Groups { rotation, values, scales, starts, format } = self;
        how.isa.run(QuantiseRows { x, rows, rotation, values, scales, starts, format });
    }
}

/// The first `len` of `values`, which grow where they are fewer.
fn grown<T: Copy + Default>(values: &mut Vec<T>, len: usize) -> &mut [T] {
    if values.len() < len {
        values.resize(len, T::default());
    }
    &mut values[..len]
}
