//! Sixteen float32 lanes on every instruction set, so that each does the same operations in the same order.
//!
//! A kernel is a small struct of slices that implements [`Kernel`]; [`Isa::run`] runs it on an instruction set that
//! this machine is known to have. A [`Simd`] value is the proof: only [`Isa::available`] makes one.

use crate::error::{Error, Result};
use half::bf16;

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// Lanes of a register, on every instruction set.
pub const LANES: usize = 16;

/// An instruction set: sixteen float32 lanes and what GPT-2 does with them.
///
/// Every operation is correctly rounded (IEEE 754, to nearest even), so all implementations give the same bits.
pub trait Simd: Copy {
    /// Sixteen float32 lanes.
    type F32: Copy;

    /// Whether 32 registers of 16 lanes exist, which decides how large a tile of accumulators may be.
    const WIDE: bool;

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::F32;
    /// Lanes from memory.
    fn load(self, lanes: &[f32; LANES]) -> Self::F32;
    /// bfloat16 lanes from memory, widened (exact).
    fn load_bf16(self, lanes: &[bf16; LANES]) -> Self::F32;
    /// Lanes to memory.
    fn store(self, value: Self::F32, lanes: &mut [f32; LANES]);
    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `if a > b { a } else { b }`: of two NaNs or zeros, `b`.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `if a < b { then } else { otherwise }`, lane by lane.
    fn select_less(self, a: Self::F32, b: Self::F32, then: Self::F32, otherwise: Self::F32) -> Self::F32;
    /// The bits of `value` plus the bits of `n` shifted left by 23: `value * 2^n` when `n` holds an integer in its
    /// lowest bits, as `x + 1.5 * 2^23` does.
    fn add_exponent(self, value: Self::F32, n: Self::F32) -> Self::F32;
    /// The sum of the lanes by one fixed tree: lane i with i + 8, then i + 4, i + 2, i + 1.
    fn reduce_add(self, value: Self::F32) -> f32;
    /// The greatest lane, by the same tree of [`Simd::max`].
    fn reduce_max(self, value: Self::F32) -> f32;
    /// Asks for the cache line at `address` into the first-level cache; any address may be given.
    fn prefetch<T>(self, address: *const T);
    /// Asks for the cache line at `address` into the second-level cache.
    fn prefetch_l2<T>(self, address: *const T);
}

/// A type that weights and caches are held in.
pub trait Element: Copy + Default + Send + Sync + bytemuck::Pod {
    /// Sixteen of them as float32 lanes.
    fn load<S: Simd>(simd: S, lanes: &[Self; LANES]) -> S::F32;
    /// Rounded to nearest even.
    fn from_f32(value: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, lanes: &[f32; LANES]) -> S::F32 {
        simd.load(lanes)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(simd: S, lanes: &[bf16; LANES]) -> S::F32 {
        simd.load_bf16(lanes)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Work to be compiled for every instruction set.
pub trait Kernel {
    /// What it gives.
    type Output;
    /// The work; `#[inline(always)]`, so that it is compiled with the instruction set's features.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub enum Isa {
    /// Plain arrays, on any machine.
    Portable(Portable),
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// All that this machine has, slowest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut all = vec![Isa::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::detect().map(Isa::Avx2));
            all.extend(Avx512::detect().map(Isa::Avx512));
        }
        all
    }

    /// The instruction set called `name`.
    ///
    /// # Errors
    /// [`Error::UnknownIsa`], and [`Error::MissingIsa`] when this machine lacks it: never a silent substitute.
    pub fn named(name: &str) -> Result<Isa> {
        let known = ["portable", "avx2", "avx512"]
            .into_iter()
            .find(|&known| known == name)
            .ok_or_else(|| Error::UnknownIsa(name.to_owned()))?;
        Isa::available().into_iter().find(|isa| isa.name() == known).ok_or(Error::MissingIsa(known))
    }

    /// The one that the environment variable `GPT2RS_ISA` names, or else the fastest here.
    ///
    /// # Errors
    /// As [`Isa::named`].
    pub fn from_env() -> Result<Isa> {
        match std::env::var("GPT2RS_ISA") {
            Ok(name) if !name.is_empty() => Isa::named(&name),
            _ => Ok(*Isa::available().last().expect("portable is always there")),
        }
    }

    /// `portable`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
        }
    }

    /// Runs a kernel compiled for this instruction set, in the default floating-point mode: callers may have set
    /// flush-to-zero or another rounding, which would change bits.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        in_default_mode(|| match self {
            Isa::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(simd) => simd.vectorize(kernel),
        })
    }
}

/// Runs `work` rounding to nearest even and keeping subnormals, whatever this thread had set.
pub fn in_default_mode<R>(work: impl FnOnce() -> R) -> R {
    let _mode = DefaultMode::enter();
    work()
}

/// While it lives, this thread rounds to nearest even and keeps subnormals; then the caller's mode is back.
struct DefaultMode {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    callers: ModeRegister,
}

#[cfg(target_arch = "x86_64")]
type ModeRegister = u32;
#[cfg(target_arch = "aarch64")]
type ModeRegister = u64;

#[cfg(target_arch = "x86_64")]
fn read_mode() -> ModeRegister {
    let mut mode = 0u32;
    // SAFETY: stmxcsr writes four bytes to the address of a live u32; every x86-64 has SSE.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack, preserves_flags)) };
    mode
}

#[cfg(target_arch = "x86_64")]
fn write_mode(mode: ModeRegister) {
    // SAFETY: ldmxcsr reads four bytes from a live u32. All exceptions are masked in the values given (the default, or
    // what this thread had before), and compiled code assumes the default mode, which `enter` restores.
    unsafe {
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack, preserves_flags, readonly))
    };
}

#[cfg(target_arch = "aarch64")]
fn read_mode() -> ModeRegister {
    let mode: u64;
    // SAFETY: FPCR may be read in user mode and reading it changes nothing.
    unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) mode, options(nomem, nostack, preserves_flags)) };
    mode
}

#[cfg(target_arch = "aarch64")]
fn write_mode(mode: ModeRegister) {
    // SAFETY: FPCR may be written in user mode; the value is the default or what this thread had before.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) mode, options(nomem, nostack, preserves_flags)) };
}

impl DefaultMode {
    fn enter() -> DefaultMode {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        {
            const DEFAULT: ModeRegister = if cfg!(target_arch = "x86_64") { 0x1f80 } else { 0 };
            let callers = read_mode();
            write_mode(DEFAULT);
            DefaultMode { callers }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        DefaultMode {}
    }
}

impl Drop for DefaultMode {
    fn drop(&mut self) {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        write_mode(self.callers);
    }
}

/// The first `LANES` of `slice`, the missing ones zero.
#[inline(always)]
pub fn load_partial<S: Simd, T: Element>(simd: S, slice: &[T]) -> S::F32 {
    if let Some(full) = slice.first_chunk::<LANES>() {
        return T::load(simd, full);
    }
    let mut lanes = [T::default(); LANES];
    lanes[..slice.len()].copy_from_slice(slice);
    T::load(simd, &lanes)
}

/// Stores as many lanes as fit into `slice`.
#[inline(always)]
pub fn store_partial<S: Simd>(simd: S, value: S::F32, slice: &mut [f32]) {
    if let Some(full) = slice.first_chunk_mut::<LANES>() {
        return simd.store(value, full);
    }
    let mut lanes = [0.0; LANES];
    simd.store(value, &mut lanes);
    slice.copy_from_slice(&lanes[..slice.len()]);
}
