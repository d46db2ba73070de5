//! Two links of a chain at a time: how products of each element type are summed.
//!
//! A step is two rows of 16 lanes: two inputs of sixteen columns of a weight matrix, two channels of sixteen positions'
//! keys, or two positions of sixteen channels' values. Narrow types lie in pairs, so that one register holds a step.

use super::round::{integer_pairs, quantised_pairs, rounded_pairs};
use crate::simd::{LANES, Simd, load_partial};
use half::bf16;

/// How steps are held and multiplied.
pub trait Pairs: Copy + Send + Sync + 'static {
    /// Two rows of 16 lanes.
    type Step: bytemuck::Pod;
    /// What the two rows are multiplied with.
    type X: bytemuck::Pod;
    /// A register of what is multiplied or summed.
    type Lanes<S: Simd>: Copy;
    /// Times that steps are gone through: once for each row, where rows are widened.
    const TURNS: usize;
    /// Whether this uses dot products of pairs.
    const DOTS: bool;

    /// No sum yet.
    fn zero<S: Simd>(simd: S) -> Self::Lanes<S>;
    /// What turn `turn` multiplies.
    fn lanes<S: Simd>(simd: S, step: &Self::Step, turn: usize) -> Self::Lanes<S>;
    /// The same for turn 0 where the second row must not count, whatever it holds; its input is zero then.
    fn first<S: Simd>(simd: S, step: &Self::Step) -> Self::Lanes<S>;
    /// Adds the products of turn `turn`.
    fn add<S: Simd>(
        simd: S,
        sum: Self::Lanes<S>,
        lanes: Self::Lanes<S>,
        x: Self::X,
        turn: usize,
    ) -> Self::Lanes<S>;
    /// The sum as float32, which must be multiplied by the scale of the inputs.
    fn finish<S: Simd>(simd: S, sum: Self::Lanes<S>) -> S::F32;
    /// Puts an unfinished sum away.
    fn save<S: Simd>(simd: S, sum: Self::Lanes<S>, room: &mut [f32; LANES]);
    /// Takes it out again.
    fn resume<S: Simd>(simd: S, room: &[f32; LANES]) -> Self::Lanes<S>;
    /// Sixteen inputs of scale 1; integers must fit.
    fn sixteen<S: Simd>(simd: S, x: S::F32) -> [Self::X; LANES / 2];
    /// Inputs from float32, an odd last one with a zero beside it; gives their scale.
    #[inline(always)]
    fn inputs<S: Simd>(simd: S, x: &[f32], out: &mut [Self::X]) -> f32 {
        for (lanes, out) in x.chunks(LANES).zip(out.chunks_mut(LANES / 2)) {
            out.copy_from_slice(&Self::sixteen(simd, load_partial(simd, lanes))[..out.len()]);
        }
        1.0
    }
}

/// float32 steps, one row after the other.
#[derive(Clone, Copy)]
pub struct F32;

/// bfloat16 steps, widened. The first of a pair lies behind the second, the order in which `vdpbf16ps` takes them.
#[derive(Clone, Copy)]
pub struct Bf16;

/// The same steps with inputs rounded to bfloat16, too. To be run by `Isa::run_flushing`.
#[derive(Clone, Copy)]
pub struct Bf16Dots;

/// int8 steps with int16 inputs, summed exactly in int32.
#[derive(Clone, Copy)]
pub struct Int8;

macro_rules! summed_in_float32 {
    () => {
        type Lanes<S: Simd> = S::F32;

        #[inline(always)]
        fn zero<S: Simd>(simd: S) -> S::F32 {
            simd.splat(0.0)
        }
        #[inline(always)]
        fn finish<S: Simd>(_: S, sum: S::F32) -> S::F32 {
            sum
        }
        #[inline(always)]
        fn save<S: Simd>(simd: S, sum: S::F32, room: &mut [f32; LANES]) {
            simd.store(sum, room);
        }
        #[inline(always)]
        fn resume<S: Simd>(simd: S, room: &[f32; LANES]) -> S::F32 {
            simd.load(room)
        }
    };
}

impl Pairs for F32 {
    type Step = [[f32; LANES]; 2];
    type X = [f32; 2];
    const TURNS: usize = 2;
    const DOTS: bool = false;
    summed_in_float32!();

    #[inline(always)]
    fn lanes<S: Simd>(simd: S, step: &[[f32; LANES]; 2], turn: usize) -> S::F32 {
        simd.load(&step[turn])
    }
    #[inline(always)]
    fn first<S: Simd>(simd: S, step: &[[f32; LANES]; 2]) -> S::F32 {
        simd.load(&step[0])
    }
    #[inline(always)]
    fn add<S: Simd>(simd: S, sum: S::F32, lanes: S::F32, x: [f32; 2], turn: usize) -> S::F32 {
        simd.fma(simd.splat(x[turn]), lanes, sum)
    }
    #[inline(always)]
    fn sixteen<S: Simd>(simd: S, x: S::F32) -> [[f32; 2]; LANES / 2] {
        let mut lanes = [0.0; LANES];
        simd.store(x, &mut lanes);
        bytemuck::cast(lanes)
    }
}

impl Pairs for Bf16 {
    type Step = [[bf16; 2]; LANES];
    type X = [f32; 2];
    const TURNS: usize = 2;
    const DOTS: bool = false;
    summed_in_float32!();

    #[inline(always)]
    fn lanes<S: Simd>(simd: S, step: &[[bf16; 2]; LANES], turn: usize) -> S::F32 {
        let pairs = simd.load_pairs(step);
        if turn == 0 { simd.first_of_pairs(pairs) } else { simd.second_of_pairs(pairs) }
    }
    #[inline(always)]
    fn first<S: Simd>(simd: S, step: &[[bf16; 2]; LANES]) -> S::F32 {
        simd.first_of_pairs(simd.load_pairs(step))
    }
    #[inline(always)]
    fn add<S: Simd>(simd: S, sum: S::F32, lanes: S::F32, x: [f32; 2], turn: usize) -> S::F32 {
        simd.fma(simd.splat(x[turn]), lanes, sum)
    }
    #[inline(always)]
    fn sixteen<S: Simd>(simd: S, x: S::F32) -> [[f32; 2]; LANES / 2] {
        let mut lanes = [0.0; LANES];
        simd.store(x, &mut lanes);
        bytemuck::cast(lanes)
    }
}

impl Pairs for Bf16Dots {
    type Step = [[bf16; 2]; LANES];
    type X = [bf16; 2];
    const TURNS: usize = 1;
    const DOTS: bool = true;
    summed_in_float32!();

    #[inline(always)]
    fn lanes<S: Simd>(simd: S, step: &[[bf16; 2]; LANES], _: usize) -> S::F32 {
        simd.load_pairs(step)
    }
    #[inline(always)]
    fn first<S: Simd>(simd: S, step: &[[bf16; 2]; LANES]) -> S::F32 {
        simd.first_of_pairs(simd.load_pairs(step))
    }
    #[inline(always)]
    fn add<S: Simd>(simd: S, sum: S::F32, lanes: S::F32, x: [bf16; 2], _: usize) -> S::F32 {
        simd.dot_pairs(sum, lanes, x)
    }
    #[inline(always)]
    fn sixteen<S: Simd>(simd: S, x: S::F32) -> [[bf16; 2]; LANES / 2] {
        rounded_pairs(simd, x)
    }
}

impl Pairs for Int8 {
    type Step = [[i8; 2]; LANES];
    type X = [i16; 2];
    type Lanes<S: Simd> = S::I32;
    const TURNS: usize = 1;
    const DOTS: bool = true;

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::I32 {
        simd.splat_i32(0)
    }
    #[inline(always)]
    fn lanes<S: Simd>(simd: S, step: &[[i8; 2]; LANES], _: usize) -> S::I32 {
        simd.load_i8_pairs(step)
    }
    #[inline(always)]
    fn first<S: Simd>(simd: S, step: &[[i8; 2]; LANES]) -> S::I32 {
        simd.load_i8_pairs(step)
    }
    #[inline(always)]
    fn add<S: Simd>(simd: S, sum: S::I32, lanes: S::I32, x: [i16; 2], _: usize) -> S::I32 {
        simd.dot_i16_pairs(sum, lanes, x)
    }
    #[inline(always)]
    fn finish<S: Simd>(simd: S, sum: S::I32) -> S::F32 {
        simd.to_f32(sum)
    }
    #[inline(always)]
    fn save<S: Simd>(simd: S, sum: S::I32, room: &mut [f32; LANES]) {
        simd.store(simd.as_f32(sum), room);
    }
    #[inline(always)]
    fn resume<S: Simd>(simd: S, room: &[f32; LANES]) -> S::I32 {
        simd.as_i32(simd.load(room))
    }
    #[inline(always)]
    fn sixteen<S: Simd>(simd: S, x: S::F32) -> [[i16; 2]; LANES / 2] {
        integer_pairs(simd, x)
    }
    #[inline(always)]
    fn inputs<S: Simd>(simd: S, x: &[f32], out: &mut [[i16; 2]]) -> f32 {
        quantised_pairs(simd, x, out)
    }
}
