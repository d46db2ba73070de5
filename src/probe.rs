//! What the machine can do, measured in the run whose figures it limits: read bandwidth, and the peaks of fused
//! multiply-adds and of dot products.

use crate::error::{Error, Result};
use crate::mapped::Arena;
use crate::pool::{Pool, share};
use crate::simd::{BYTES, Isa, Kernel, LANES, Simd};
use half::bf16;
use std::hint::black_box;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

/// Memory that is far larger than any cache, and the threads that read it.
pub struct Bandwidth {
    arena: Arena,
    pool: Pool,
    isa: Isa,
}

impl Bandwidth {
    /// Takes and fills 512 MiB, on huge pages where weights would get them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Threads`].
    pub fn new(isa: Isa, n_threads: usize) -> Result<Bandwidth> {
        const BYTES: usize = 512 << 20;
        let mut arena = Arena::new(BYTES).map_err(|source| Error::OutOfMemory { bytes: BYTES, source })?;
        arena.bytes_mut().fill(1);
        let pool = Pool::new(n_threads).map_err(|source| Error::Threads { n_threads, source })?;
        Ok(Bandwidth { arena, pool, isa })
    }

    /// Reads all of it once, and gives bytes a second.
    pub fn measure(&mut self) -> f64 {
        let floats: &[f32] = bytemuck::cast_slice(self.arena.bytes_mut());
        let n = self.pool.n_threads();
        let parts = (0..n).map(|i| {
            &floats[share(floats.len() / 1024, n, i).start * 1024..][..floats.len() / n / 1024 * 1024]
        });
        let isa = self.isa;
        let start = Instant::now();
        self.pool.run(parts.collect(), |part: &[f32]| {
            black_box(isa.run(Read(part)));
        });
        size_of_val(floats) as f64 / start.elapsed().as_secs_f64()
    }
}

struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        // As far ahead as the products ask for their weights, and as many sums as hide an addition's latency.
        const AHEAD: usize = (6 << 10) / size_of::<f32>();
        const SUMS: usize = 8;
        let mut sums = [simd.splat(0.0); SUMS];
        let (registers, _) = self.0.as_chunks::<LANES>();
        let (groups, _) = registers.as_chunks::<SUMS>();
        for group in groups {
            for (sum, lanes) in sums.iter_mut().zip(group) {
                simd.prefetch(lanes.as_ptr().wrapping_add(AHEAD));
                *sum = simd.add(*sum, simd.load(lanes));
            }
        }
        let mut total = sums[0];
        for &sum in &sums[1..] {
            total = simd.add(total, sum);
        }
        simd.reduce_add(total)
    }
}

/// Fused multiply-adds on registers alone, on `n_threads` threads at once, in floating-point operations a second (an
/// FMA of a lane is two).
///
/// # Errors
/// [`Error::Threads`].
pub fn fma_peak(isa: Isa, n_threads: usize) -> Result<f64> {
    peak::<Fma>(isa, n_threads)
}

/// The same for dot products of bfloat16 pairs: four operations a lane.
///
/// # Errors
/// [`Error::Threads`].
pub fn dot_bf16_peak(isa: Isa, n_threads: usize) -> Result<f64> {
    peak::<DotBf16>(isa, n_threads)
}

/// The same for dot products of four bytes: eight integer operations a lane.
///
/// # Errors
/// [`Error::Threads`].
pub fn dot_int8_peak(isa: Isa, n_threads: usize) -> Result<f64> {
    peak::<DotInt8>(isa, n_threads)
}

fn peak<U: Unit>(isa: Isa, n_threads: usize) -> Result<f64> {
    const STEPS: usize = 1 << 20;
    /// Long enough for the system to have put new threads on cores of their own.
    const LONG: Duration = Duration::from_millis(150);
    let mut pool = Pool::new(n_threads).map_err(|source| Error::Threads { n_threads, source })?;
    let mut best = 0.0_f64;
    let begin = Instant::now();
    while begin.elapsed() < LONG {
        let start = Instant::now();
        pool.run(vec![isa; n_threads], |isa: Isa| {
            black_box(isa.run_flushing(Chains { steps: STEPS, unit: PhantomData::<U> }));
        });
        let operations = (U::OPERATIONS * LANES * CHAINS * STEPS * n_threads) as f64;
        best = best.max(operations / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// What multiplies and adds.
trait Unit: Send + Sync {
    /// Of a lane in a step; a multiplication and an addition are two.
    const OPERATIONS: usize;
    /// As [`Kernel::DOTS`].
    const DOTS: bool;
    /// What differs from step to step.
    type X: Copy;
    /// Any.
    const X: Self::X;
    /// What stays.
    type Weights<S: Simd>: Copy;
    /// A chain's.
    type Sum<S: Simd>: Copy;
    fn weights<S: Simd>(simd: S) -> Self::Weights<S>;
    fn start<S: Simd>(simd: S) -> Self::Sum<S>;
    fn step<S: Simd>(simd: S, sum: Self::Sum<S>, weights: Self::Weights<S>, x: Self::X) -> Self::Sum<S>;
    fn finish<S: Simd>(simd: S, sum: Self::Sum<S>) -> S::F32;
}

struct Fma;

impl Unit for Fma {
    const OPERATIONS: usize = 2;
    const DOTS: bool = false;
    type X = ();
    const X: () = ();
    type Weights<S: Simd> = [S::F32; 2];
    type Sum<S: Simd> = S::F32;

    #[inline(always)]
    fn weights<S: Simd>(simd: S) -> [S::F32; 2] {
        [simd.splat(black_box(0.999)), simd.splat(black_box(0.001))]
    }
    #[inline(always)]
    fn start<S: Simd>(simd: S) -> S::F32 {
        simd.splat(1.0)
    }
    #[inline(always)]
    fn step<S: Simd>(simd: S, sum: S::F32, [a, b]: [S::F32; 2], (): ()) -> S::F32 {
        simd.fma(sum, a, b)
    }
    #[inline(always)]
    fn finish<S: Simd>(_: S, sum: S::F32) -> S::F32 {
        sum
    }
}

struct DotBf16;

impl Unit for DotBf16 {
    const OPERATIONS: usize = 4;
    const DOTS: bool = true;
    type X = [bf16; 2];
    const X: [bf16; 2] = [bf16::from_f32_const(0.5), bf16::from_f32_const(-0.25)];
    type Weights<S: Simd> = S::F32;
    type Sum<S: Simd> = S::F32;

    #[inline(always)]
    fn weights<S: Simd>(simd: S) -> S::F32 {
        simd.load_pairs(&[[bf16::ONE; 2]; LANES])
    }
    #[inline(always)]
    fn start<S: Simd>(simd: S) -> S::F32 {
        simd.splat(1.0)
    }
    #[inline(always)]
    fn step<S: Simd>(simd: S, sum: S::F32, weights: S::F32, x: [bf16; 2]) -> S::F32 {
        simd.dot_pairs(sum, weights, x)
    }
    #[inline(always)]
    fn finish<S: Simd>(_: S, sum: S::F32) -> S::F32 {
        sum
    }
}

struct DotInt8;

impl Unit for DotInt8 {
    const OPERATIONS: usize = 8;
    const DOTS: bool = true;
    type X = [i8; 4];
    const X: [i8; 4] = [1, -2, 3, -1];
    type Weights<S: Simd> = S::Bytes;
    type Sum<S: Simd> = S::I32;

    #[inline(always)]
    fn weights<S: Simd>(simd: S) -> S::Bytes {
        simd.load_bytes(&black_box([3; BYTES]))
    }
    #[inline(always)]
    fn start<S: Simd>(simd: S) -> S::I32 {
        simd.splat_i32(1)
    }
    #[inline(always)]
    fn step<S: Simd>(simd: S, sum: S::I32, weights: S::Bytes, x: [i8; 4]) -> S::I32 {
        simd.dot_bytes(sum, weights, x)
    }
    #[inline(always)]
    fn finish<S: Simd>(simd: S, sum: S::I32) -> S::F32 {
        simd.to_f32(sum)
    }
}

/// Enough independent chains for two units of latency four or five, few enough for sixteen registers of half the width.
const CHAINS: usize = 6;

struct Chains<U> {
    steps: usize,
    unit: PhantomData<U>,
}

impl<U: Unit> Kernel for Chains<U> {
    type Output = f32;
    const DOTS: bool = U::DOTS;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let weights = U::weights(simd);
        // Twice as many registers where lanes fill one each.
        let mut first = [U::start(simd); CHAINS];
        let mut second = [U::start(simd); CHAINS];
        let steps = if S::WIDE { self.steps / 2 } else { self.steps };
        for _ in 0..steps {
            // From memory, as in a product; known to be the same, its products would be taken out of the loop.
            let x = black_box(U::X);
            for sum in &mut first {
                *sum = U::step(simd, *sum, weights, x);
            }
            if S::WIDE {
                for sum in &mut second {
                    *sum = U::step(simd, *sum, weights, x);
                }
            }
        }
        let mut total = simd.splat(0.0);
        for sum in first.into_iter().chain(second) {
            total = simd.add(total, U::finish(simd, sum));
        }
        simd.reduce_add(total)
    }
}
