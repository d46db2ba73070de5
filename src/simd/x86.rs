//! AVX2 with FMA, and AVX-512, each with its extensions for dot products. The token types prove that the processor and
//! the operating system have the features: only `detect` makes one (CPUID, and XGETBV for the state that the system
//! saves).

use super::Kernel;

/// Lane i + 4, then i + 2, then i + 1, by `$op`: the end of the fixed tree, from four lanes on.
macro_rules! finish_tree {
    ($four:expr, $op:ident, $op_ss:ident) => {{
        let four = $four;
        let two = $op(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32($op_ss(two, _mm_shuffle_ps(two, two, 1)))
    }};
}

mod avx2;
mod avx512;

/// AVX2 and FMA, with AVX-VNNI or without: a register of sixteen lanes is two of eight.
#[derive(Clone, Copy, Debug)]
pub struct Avx2<const VNNI: bool>(());

/// AVX-512 F, BW, DQ and VL, with VNNI and BF16 or without.
#[derive(Clone, Copy, Debug)]
pub struct Avx512<const VNNI: bool, const BF16: bool>(());

/// `detect` and `vectorize` of a token, for the features of its set.
macro_rules! instruction_set {
    ($token:ident<$($parameter:literal),+>: $($feature:tt),+; $enable:literal) => {
        impl $token<$($parameter),+> {
            pub(super) fn detect() -> Option<Self> {
                ($(is_x86_feature_detected!($feature))&&+).then_some($token(()))
            }

            #[inline]
            pub(super) fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
                #[target_feature(enable = $enable)]
                fn inner<K: Kernel>(simd: $token<$($parameter),+>, kernel: K) -> K::Output {
                    kernel.run(simd)
                }
                // SAFETY: the token exists only where `detect` found these features.
                unsafe { inner(self, kernel) }
            }
        }
    };
}

instruction_set!(Avx2<false>: "avx2", "fma"; "avx2,fma");
instruction_set!(Avx2<true>: "avx2", "fma", "avxvnni"; "avx2,fma,avxvnni");
instruction_set!(Avx512<false, false>: "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl";
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl");
instruction_set!(Avx512<true, false>: "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni";
    "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");
instruction_set!(Avx512<true, true>: "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni",
    "avx512bf16"; "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16");

impl<const VNNI: bool> Avx2<VNNI> {
    /// The set that this one extends.
    pub(super) fn base(self) -> Avx2<false> {
        Avx2(())
    }
}

impl<const VNNI: bool, const BF16: bool> Avx512<VNNI, BF16> {
    /// The set that this one extends.
    pub(super) fn base(self) -> Avx512<false, false> {
        Avx512(())
    }
}
