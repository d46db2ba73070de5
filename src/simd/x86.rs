//! AVX2 with FMA, and AVX-512. The token types prove that the processor and the operating system have the features:
//! only `detect` makes one (CPUID, and XGETBV for the state that the system saves).

use super::{Kernel, LANES, Simd};
use half::bf16;
use std::arch::x86_64::*;

/// AVX2 and FMA: a register of sixteen lanes is two of eight.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Avx2 {
    pub(super) fn detect() -> Option<Avx2> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Avx2(()))
    }

    #[inline]
    pub(super) fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma")]
        fn inner<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: an Avx2 exists only where `detect` found these features.
        unsafe { inner(self, kernel) }
    }
}

impl Avx512 {
    pub(super) fn detect() -> Option<Avx512> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma"))
        .then_some(Avx512(()))
    }

    #[inline]
    pub(super) fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn inner<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: an Avx512 exists only where `detect` found these features.
        unsafe { inner(self, kernel) }
    }
}

/// Lane i + 4, then i + 2, then i + 1, by `$op`: the end of the fixed tree, from four lanes on.
macro_rules! finish_tree {
    ($four:expr, $op:ident, $op_ss:ident) => {{
        let four = $four;
        let two = $op(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32($op_ss(two, _mm_shuffle_ps(two, two, 1)))
    }};
}

// In the two implementations below each block is one or a few intrinsics on registers or on arrays that are borrowed
// for their whole length, and `self` proves that the features are there.
impl Simd for Avx2 {
    type F32 = [__m256; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn load(self, lanes: &[f32; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX; both loads lie inside the sixteen lanes.
        unsafe { [_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn load_bf16(self, lanes: &[bf16; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX2; both loads of eight lie inside the sixteen lanes.
        unsafe {
            let low = _mm_loadu_si128(lanes.as_ptr().cast());
            let high = _mm_loadu_si128(lanes.as_ptr().add(8).cast());
            [
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16)),
            ]
        }
    }
    #[inline(always)]
    fn store(self, value: Self::F32, lanes: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX; both stores lie inside the sixteen lanes.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), value[0]);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(8), value[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves FMA.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX. maxps gives its second operand unless the first is greater.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn select_less(self, a: Self::F32, b: Self::F32, then: Self::F32, otherwise: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]);
            let high = _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]);
            [_mm256_blendv_ps(otherwise[0], then[0], low), _mm256_blendv_ps(otherwise[1], then[1], high)]
        }
    }
    #[inline(always)]
    fn add_exponent(self, value: Self::F32, n: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let half = |value: __m256, n: __m256| {
                let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), n))
            };
            [half(value[0], n[0]), half(value[1], n[1])]
        }
    }
    #[inline(always)]
    fn reduce_add(self, value: Self::F32) -> f32 {
        // SAFETY: `self` proves AVX.
        unsafe {
            let eight = _mm256_add_ps(value[0], value[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            finish_tree!(four, _mm_add_ps, _mm_add_ss)
        }
    }
    #[inline(always)]
    fn reduce_max(self, value: Self::F32) -> f32 {
        // SAFETY: `self` proves AVX.
        unsafe {
            let eight = _mm256_max_ps(value[0], value[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            finish_tree!(four, _mm_max_ps, _mm_max_ss)
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[inline(always)]
    fn prefetch_l2<T>(self, address: *const T) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
}

impl Simd for Avx512 {
    type F32 = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn load(self, lanes: &[f32; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F; the load is the sixteen lanes.
        unsafe { _mm512_loadu_ps(lanes.as_ptr()) }
    }
    #[inline(always)]
    fn load_bf16(self, lanes: &[bf16; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F; the load is the sixteen lanes.
        unsafe {
            let half = _mm256_loadu_si256(lanes.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    fn store(self, value: Self::F32, lanes: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX-512 F; the store is the sixteen lanes.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), value) }
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F. maxps gives its second operand unless the first is greater.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn select_less(self, a: Self::F32, b: Self::F32, then: Self::F32, otherwise: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), otherwise, then) }
    }
    #[inline(always)]
    fn add_exponent(self, value: Self::F32, n: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), n))
        }
    }
    #[inline(always)]
    fn reduce_add(self, value: Self::F32) -> f32 {
        // SAFETY: `self` proves AVX-512 F and DQ.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps::<1>(value));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            finish_tree!(four, _mm_add_ps, _mm_add_ss)
        }
    }
    #[inline(always)]
    fn reduce_max(self, value: Self::F32) -> f32 {
        // SAFETY: `self` proves AVX-512 F and DQ.
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps::<1>(value));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            finish_tree!(four, _mm_max_ps, _mm_max_ss)
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[inline(always)]
    fn prefetch_l2<T>(self, address: *const T) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
}
