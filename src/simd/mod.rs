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

/// Bytes of a register, where it holds bytes.
pub const BYTES: usize = 4 * LANES;

/// Lanes of a register, on every instruction set.
pub const LANES: usize = 16;

/// An instruction set: sixteen float32 lanes and what GPT-2 does with them.
///
/// Every operation is correctly rounded (IEEE 754, to nearest even), so all implementations give the same bits.
pub trait Simd: Copy {
    /// Sixteen float32 lanes.
    type F32: Copy;
    /// Sixteen int32 lanes.
    type I32: Copy;
    /// Sixty-four bytes, of which four belong to each lane.
    type Bytes: Copy;

    /// Whether 32 registers of 16 lanes exist, which decides how large a tile of accumulators may be.
    const WIDE: bool;

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::F32;
    /// Lanes from memory.
    fn load(self, lanes: &[f32; LANES]) -> Self::F32;
    /// bfloat16 lanes from memory, widened (exact).
    fn load_bf16(self, lanes: &[bf16; LANES]) -> Self::F32;
    /// Two bfloat16 a lane from memory as they are: the first of a pair lies behind the second.
    fn load_pairs(self, pairs: &[[bf16; 2]; LANES]) -> Self::F32;
    /// The first of each pair, widened (exact).
    fn first_of_pairs(self, pairs: Self::F32) -> Self::F32;
    /// The second of each pair, widened (exact).
    fn second_of_pairs(self, pairs: Self::F32) -> Self::F32;
    /// `second * x[0] + (first * x[1] + sum)`, each fused, for each lane's pair, in the flushing mode (see
    /// [`Isa::run_flushing`]): what `vdpbf16ps` computes.
    fn dot_pairs(self, sum: Self::F32, pairs: Self::F32, x: [bf16; 2]) -> Self::F32;
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
    /// The square root, rounded once.
    fn sqrt(self, value: Self::F32) -> Self::F32;
    /// Sixteen rows as their columns: lane j of row i becomes lane i of row j.
    fn transpose(self, rows: [Self::F32; LANES]) -> [Self::F32; LANES];
    /// `x * b + c`, rounded once, `x` for every lane, straight from memory. For tiles whose right factor is widened
    /// as it is loaded: left to load `x` by itself, LLVM loads so many ahead of their use that the sums lose their
    /// registers.
    #[inline(always)]
    fn fma_from(self, x: &f32, b: Self::F32, c: Self::F32) -> Self::F32 {
        self.fma(self.splat(*x), b, c)
    }
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
    /// `value` in every lane.
    fn splat_i32(self, value: i32) -> Self::I32;
    /// int8 lanes from memory, widened.
    fn load_i8(self, lanes: &[i8; LANES]) -> Self::I32;
    /// `a * b + c` modulo 2^32.
    fn mul_add_i32(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32;
    /// To the nearest float32, ties to even.
    fn to_f32(self, value: Self::I32) -> Self::F32;
    /// The same bits.
    fn as_i32(self, bits: Self::F32) -> Self::I32;
    /// The same bits.
    fn as_f32(self, bits: Self::I32) -> Self::F32;
    /// Bytes from memory.
    fn load_bytes(self, bytes: &[u8; BYTES]) -> Self::Bytes;
    /// The bytes that `table` has at the lower halves of `bytes`, and at the upper ones.
    fn look_up(self, table: &[u8; 16], bytes: Self::Bytes) -> [Self::Bytes; 2];
    /// Adds the products of each lane's four bytes with `x`, exactly.
    fn dot_bytes(self, sum: Self::I32, bytes: Self::Bytes, x: [i8; 4]) -> Self::I32;
    /// Two int8 a lane from memory, widened to int16.
    fn load_i8_pairs(self, pairs: &[[i8; 2]; LANES]) -> Self::I32;
    /// Adds the products of each lane's two int16 with `x`, exactly.
    fn dot_i16_pairs(self, sum: Self::I32, pairs: Self::I32, x: [i16; 2]) -> Self::I32;
    /// To the nearest integers, ties to even; they must fit.
    fn round_to_i8(self, value: Self::F32, out: &mut [i8; LANES]);
    /// To the nearest integers, ties to even; they must fit.
    fn round_to_i16(self, value: Self::F32, out: &mut [i16; LANES]);
    /// To the nearest bfloat16, ties to even, two a lane as [`Simd::load_pairs`] takes them; NaN stays NaN.
    fn round_to_pairs(self, first: Self::F32, second: Self::F32, out: &mut [[bf16; 2]; LANES]);
    /// To the nearest bfloat16, ties to even; NaN stays NaN.
    fn round_to_bf16(self, value: Self::F32, out: &mut [bf16; LANES]);
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
    /// Whether it uses dot products of bytes or of bfloat16 pairs, for which some sets have instructions beyond those of
    /// the set that they extend; other kernels are not compiled again for these.
    const DOTS: bool = false;
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
    Avx2(Avx2<false>),
    /// The same with AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(Avx2<true>),
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false, false>),
    /// The same with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512<true, false>),
    /// The same with VNNI and BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512<true, true>),
}

impl Isa {
    /// The names of all, slowest first.
    pub const NAMES: [&str; 6] = ["portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16"];

    /// All that this machine has, slowest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut all = vec![Isa::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::<false>::detect().map(Isa::Avx2));
            all.extend(Avx2::<true>::detect().map(Isa::AvxVnni));
            all.extend(Avx512::<false, false>::detect().map(Isa::Avx512));
            all.extend(Avx512::<true, false>::detect().map(Isa::Avx512Vnni));
            all.extend(Avx512::<true, true>::detect().map(Isa::Avx512Bf16));
        }
        all
    }

    /// The instruction set called `name`.
    ///
    /// # Errors
    /// [`Error::UnknownIsa`], and [`Error::MissingIsa`] when this machine lacks it: never a silent substitute.
    pub fn named(name: &str) -> Result<Isa> {
        let known = Isa::NAMES
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

    /// One of [`Isa::NAMES`].
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni(_) => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni(_) => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(_) => "avx512bf16",
        }
    }

    /// Runs a kernel compiled for this instruction set, in the default floating-point mode: callers may have set
    /// flush-to-zero or another rounding, which would change bits.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        in_default_mode(|| self.dispatch(kernel))
    }

    /// The same in a mode in which subnormal inputs and results are zeros, which `vdpbf16ps` can't be told to keep.
    pub fn run_flushing<K: Kernel>(self, kernel: K) -> K::Output {
        let _mode = Mode::enter(FLUSHING);
        self.dispatch(kernel)
    }

    /// Never inlined into the two above, whose modes hold from call to return.
    #[inline(never)]
    fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni(simd) if K::DOTS => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni(simd) => simd.base().vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni(simd) if K::DOTS => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni(simd) => simd.base().vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(simd) if K::DOTS => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(simd) => simd.base().vectorize(kernel),
        }
    }
}

/// Runs `work` rounding to nearest even and keeping subnormals, whatever this thread had set.
pub fn in_default_mode<R>(work: impl FnOnce() -> R) -> R {
    let _mode = Mode::enter(DEFAULT);
    work()
}

/// While it lives, this thread computes in a mode of ours; then the caller's is back.
struct Mode {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    callers: ModeRegister,
}

/// To nearest even, subnormals kept, no traps.
const DEFAULT: ModeRegister = if cfg!(target_arch = "x86_64") { 0x1f80 } else { 0 };
/// The same with subnormal inputs and results taken for zero.
const FLUSHING: ModeRegister = if cfg!(target_arch = "x86_64") { 0x9fc0 } else { 1 << 24 };

#[cfg(not(target_arch = "aarch64"))]
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
    // SAFETY: ldmxcsr reads four bytes from a live u32. All exceptions are masked in the values given (two of ours, or
    // what this thread had before). Compiled code assumes the default mode; the flushing one is on only around calls
    // that are not inlined, of kernels that mean it.
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
    // SAFETY: FPCR may be written in user mode; the value is one of ours or what this thread had before.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) mode, options(nomem, nostack, preserves_flags)) };
}

impl Mode {
    fn enter(mode: ModeRegister) -> Mode {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        {
            let callers = read_mode();
            write_mode(mode);
            Mode { callers }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            let _ = mode;
            Mode {}
        }
    }
}

impl Drop for Mode {
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
