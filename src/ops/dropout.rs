//! Dropout: each value is zeroed with probability `rate`, and the others are divided by `1 - rate`. Srivastava et al.,
//! "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
//!
//! Whether a value stays is a function of seed, step, micro-step, place in the model and index alone, so that nothing is
//! stored for the backward pass, and no thread, cut or instruction set changes it.

use super::Rows;
use crate::philox::philox4x32_lanes;
use crate::simd::{Kernel, LANES, Simd, load_partial, store_partial};

/// Values whose factors are made together.
pub const GROUP: usize = 4 * LANES;

/// Where in the model values are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The sum of both embeddings.
    Embedding,
    /// A block's attention weights.
    Attention(usize),
    /// What a block's attention adds to the residual stream.
    Attended(usize),
    /// What a block's MLP adds to it.
    Mlp(usize),
}

/// Which pass drops how many values; each pass has masks of its own.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Key of the generator.
    pub seed: u64,
    /// The optimiser's step.
    pub step: u32,
    /// The micro-batch within the step.
    pub micro_step: u32,
    /// Probability of a zero, in 0..1.
    pub rate: f32,
}

/// The factors at one place.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    dropout: Dropout,
    place: u32,
    /// A word below this means zero.
    least: u32,
    scale: f32,
}

impl Dropout {
    /// The factors at `place`; None where nothing is dropped.
    pub fn mask(self, place: Place) -> Option<Mask> {
        // The highest bit keeps these counters apart from those of initial weights; the lower half is for indices.
        let place = match place {
            Place::Embedding => 0,
            Place::Attention(layer) => 4 * layer + 1,
            Place::Attended(layer) => 4 * layer + 2,
            Place::Mlp(layer) => 4 * layer + 3,
        };
        let place = 1 << 31 | (place as u32) << 15;
        let least = (f64::from(self.rate) * 4_294_967_296.0) as u32;
        (self.rate > 0.0).then(|| Mask { dropout: self, place, least, scale: 1.0 / (1.0 - self.rate) })
    }
}

impl Mask {
    /// The factors of the values `index..index + GROUP`; the index must be a multiple of [`GROUP`].
    #[inline(always)]
    pub fn factors(&self, index: u64) -> [[f32; LANES]; 4] {
        let Dropout { seed, step, micro_step, .. } = self.dropout;
        let first = index / 4;
        // Sixteen counters in a row share their upper halves.
        let counter = [
            std::array::from_fn(|lane| first as u32 + lane as u32),
            [self.place | (first >> 32) as u32; LANES],
            [step; LANES],
            [micro_step; LANES],
        ];
        let words = philox4x32_lanes(counter, [seed as u32, (seed >> 32) as u32]);
        let mut factors = [[0.0; LANES]; 4];
        for i in 0..4 {
            for lane in 0..LANES {
                factors[i][lane] = if words[i][lane] < self.least { 0.0 } else { self.scale };
            }
        }
        factors
    }
}

/// `out = y * factors`, plus `residual` where there is one. Row i of all has the indices from i times its length, rounded
/// up to whole groups, on.
pub struct Drop<'a> {
    /// (rows, C).
    pub y: Rows<'a>,
    /// (rows, C).
    pub residual: Option<Rows<'a>>,
    /// None for factors of 1.
    pub mask: Option<Mask>,
    /// The first row's number.
    pub first: usize,
    /// As many rows as are wanted, `stride` apart.
    pub out: &'a mut [f32],
    /// Distance between rows of `out`.
    pub stride: usize,
}

impl Kernel for Drop<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let c = self.y.columns();
        for (i, out) in self.out.chunks_mut(self.stride).enumerate() {
            let y = self.y.row(i);
            let residual = match self.residual {
                Some(residual) => residual.row(i),
                None => &[],
            };
            let index = ((self.first + i) * c.next_multiple_of(GROUP)) as u64;
            for group in (0..c).step_by(GROUP) {
                let mut factors = [[1.0; LANES]; 4];
                if let Some(mask) = &self.mask {
                    factors = mask.factors(index + group as u64);
                }
                for (lanes, factors) in factors.iter().enumerate() {
                    let start = group + lanes * LANES;
                    let end = c.min(start + LANES);
                    if start < c {
                        let mut value = simd.mul(load_partial(simd, &y[start..end]), simd.load(factors));
                        if !residual.is_empty() {
                            value = simd.add(load_partial(simd, &residual[start..end]), value);
                        }
                        store_partial(simd, value, &mut out[start..end]);
                    }
                }
            }
        }
    }
}
