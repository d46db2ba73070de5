//! What the machine can do, measured in the run whose figures it limits: read bandwidth and FMA peak.

use crate::error::{Error, Result};
use crate::mapped::Arena;
use crate::pool::{Pool, share};
use crate::simd::{Isa, Kernel, LANES, Simd};
use std::hint::black_box;
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
    const STEPS: usize = 1 << 20;
    /// Long enough for the system to have put new threads on cores of their own.
    const LONG: Duration = Duration::from_millis(150);
    let mut pool = Pool::new(n_threads).map_err(|source| Error::Threads { n_threads, source })?;
    let mut best = 0.0_f64;
    let begin = Instant::now();
    while begin.elapsed() < LONG {
        let start = Instant::now();
        pool.run(vec![isa; n_threads], |isa: Isa| {
            black_box(isa.run(Multiply { steps: STEPS }));
        });
        let operations = (2 * LANES * CHAINS * STEPS * n_threads) as f64;
        best = best.max(operations / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Enough independent chains for two units of latency four or five, few enough for sixteen registers of half the width.
const CHAINS: usize = 6;

struct Multiply {
    steps: usize,
}

impl Kernel for Multiply {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (a, b) = (simd.splat(black_box(0.999)), simd.splat(black_box(0.001)));
        // Twice as many registers where lanes fill one each.
        let mut first = [simd.splat(1.0); CHAINS];
        let mut second = [simd.splat(1.0); CHAINS];
        let steps = if S::WIDE { self.steps / 2 } else { self.steps };
        for _ in 0..steps {
            for value in &mut first {
                *value = simd.fma(*value, a, b);
            }
            if S::WIDE {
                for value in &mut second {
                    *value = simd.fma(*value, a, b);
                }
            }
        }
        let mut total = simd.splat(0.0);
        for value in first.into_iter().chain(second) {
            total = simd.add(total, value);
        }
        simd.reduce_add(total)
    }
}
