//! AVX2, FMA and AVX-VNNI.

use super::Avx2;
use crate::simd::{BYTES, LANES, Simd};
use half::bf16;
use std::arch::x86_64::*;

// Each block below is one or a few intrinsics on registers or on arrays that are borrowed for their whole length, and
// `self` proves that the features are there.
impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    type Bytes = [__m256i; 2];
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
    fn load_pairs(self, pairs: &[[bf16; 2]; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX; both loads of eight lie inside the sixteen pairs.
        unsafe { [_mm256_loadu_ps(pairs.as_ptr().cast()), _mm256_loadu_ps(pairs.as_ptr().add(8).cast())] }
    }
    #[inline(always)]
    fn first_of_pairs(self, pairs: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe {
            let upper = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32));
            [_mm256_and_ps(pairs[0], upper), _mm256_and_ps(pairs[1], upper)]
        }
    }
    #[inline(always)]
    fn second_of_pairs(self, pairs: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(pairs[0]))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(pairs[1]))),
            ]
        }
    }
    #[inline(always)]
    fn dot_pairs(self, sum: Self::F32, pairs: Self::F32, [second, first]: [bf16; 2]) -> Self::F32 {
        let sum = self.fma(self.first_of_pairs(pairs), self.splat(first.to_f32()), sum);
        self.fma(self.second_of_pairs(pairs), self.splat(second.to_f32()), sum)
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
    fn sqrt(self, value: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_sqrt_ps(value[0]), _mm256_sqrt_ps(value[1])] }
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::F32; LANES]) -> [Self::F32; LANES] {
        let mut columns = rows;
        for (half, other) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let mut block = [rows[0][0]; 8];
            for i in 0..8 {
                block[i] = rows[8 * half + i][other];
            }
            // SAFETY: `self` proves AVX.
            let block = unsafe { transpose_eight(block) };
            for i in 0..8 {
                columns[8 * other + i][half] = block[i];
            }
        }
        columns
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
    fn splat_i32(self, value: i32) -> Self::I32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    fn load_i8(self, lanes: &[i8; LANES]) -> Self::I32 {
        // SAFETY: `self` proves AVX2; both loads of eight lie inside the sixteen lanes.
        unsafe {
            [
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(lanes.as_ptr().cast())),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(lanes.as_ptr().add(8).cast())),
            ]
        }
    }
    #[inline(always)]
    fn mul_add_i32(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            [
                _mm256_add_epi32(_mm256_mullo_epi32(a[0], b[0]), c[0]),
                _mm256_add_epi32(_mm256_mullo_epi32(a[1], b[1]), c[1]),
            ]
        }
    }
    #[inline(always)]
    fn to_f32(self, value: Self::I32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_cvtepi32_ps(value[0]), _mm256_cvtepi32_ps(value[1])] }
    }
    #[inline(always)]
    fn as_i32(self, bits: Self::F32) -> Self::I32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_castps_si256(bits[0]), _mm256_castps_si256(bits[1])] }
    }
    #[inline(always)]
    fn as_f32(self, bits: Self::I32) -> Self::F32 {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_castsi256_ps(bits[0]), _mm256_castsi256_ps(bits[1])] }
    }
    #[inline(always)]
    fn load_bytes(self, bytes: &[u8; BYTES]) -> Self::Bytes {
        // SAFETY: `self` proves AVX; both loads of 32 lie inside the 64 bytes.
        unsafe {
            [_mm256_loadu_si256(bytes.as_ptr().cast()), _mm256_loadu_si256(bytes.as_ptr().add(32).cast())]
        }
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::Bytes) -> [Self::Bytes; 2] {
        // SAFETY: `self` proves AVX2; the load is the table. Shuffles look up within halves of a register, so each half
        // has the table; masked indices are below 16.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            let nibble = _mm256_set1_epi8(15);
            let mut out = [bytes; 2];
            for half in 0..2 {
                let upper = _mm256_srli_epi16::<4>(bytes[half]);
                out[0][half] = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes[half], nibble));
                out[1][half] = _mm256_shuffle_epi8(table, _mm256_and_si256(upper, nibble));
            }
            out
        }
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::I32, bytes: Self::Bytes, x: [i8; 4]) -> Self::I32 {
        // SAFETY: `self` proves AVX2, and AVX-VNNI where VNNI says so.
        unsafe {
            let x = _mm256_set1_epi32(i32::from_le_bytes(bytemuck::cast(x)));
            if VNNI {
                return [
                    _mm256_dpbusd_avx_epi32(sum[0], bytes[0], x),
                    _mm256_dpbusd_avx_epi32(sum[1], bytes[1], x),
                ];
            }
            // Products of 16-bit values: those of bytes by the instruction made for them may saturate.
            let even = _mm256_set1_epi16(0xff);
            let (x_even, x_odd) =
                (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x));
            let mut out = sum;
            for half in 0..2 {
                let evens = _mm256_madd_epi16(_mm256_and_si256(bytes[half], even), x_even);
                let odds = _mm256_madd_epi16(_mm256_srli_epi16::<8>(bytes[half]), x_odd);
                out[half] = _mm256_add_epi32(out[half], _mm256_add_epi32(evens, odds));
            }
            out
        }
    }
    #[inline(always)]
    fn load_i8_pairs(self, pairs: &[[i8; 2]; LANES]) -> Self::I32 {
        // SAFETY: `self` proves AVX2; both loads of eight pairs lie inside the sixteen.
        unsafe {
            [
                _mm256_cvtepi8_epi16(_mm_loadu_si128(pairs.as_ptr().cast())),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(pairs.as_ptr().add(8).cast())),
            ]
        }
    }
    #[inline(always)]
    fn dot_i16_pairs(self, sum: Self::I32, pairs: Self::I32, x: [i16; 2]) -> Self::I32 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let x = _mm256_set1_epi32(bytemuck::cast(x));
            [
                _mm256_add_epi32(sum[0], _mm256_madd_epi16(pairs[0], x)),
                _mm256_add_epi32(sum[1], _mm256_madd_epi16(pairs[1], x)),
            ]
        }
    }
    #[inline(always)]
    fn round_to_i8(self, value: Self::F32, out: &mut [i8; LANES]) {
        let mut wide = [0; LANES];
        self.round_to_i16(value, &mut wide);
        // SAFETY: `self` proves AVX2; the load is the sixteen values, the store the sixteen lanes. Packing keeps the
        // order within quarters of a register: quarter 0 has the first eight, quarter 2 the others.
        unsafe {
            let wide = _mm256_loadu_si256(wide.as_ptr().cast());
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packs_epi16(wide, wide));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    fn round_to_i16(self, value: Self::F32, out: &mut [i16; LANES]) {
        // SAFETY: `self` proves AVX2; the store is the sixteen lanes. Packing takes quarters of both in turn.
        unsafe {
            let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(value[0]), _mm256_cvtps_epi32(value[1]));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0b11011000>(packed));
        }
    }
    #[inline(always)]
    fn round_to_pairs(self, first: Self::F32, second: Self::F32, out: &mut [[bf16; 2]; LANES]) {
        let mut rounded = [[bf16::ZERO; LANES]; 2];
        self.round_to_bf16(first, &mut rounded[0]);
        self.round_to_bf16(second, &mut rounded[1]);
        for i in 0..LANES {
            out[i] = [rounded[1][i], rounded[0][i]];
        }
    }
    #[inline(always)]
    fn round_to_bf16(self, value: Self::F32, out: &mut [bf16; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        for i in 0..LANES {
            out[i] = bf16::from_f32(lanes[i]);
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

/// Eight rows of eight as their columns.
///
/// # Safety
/// The machine must have AVX.
#[inline(always)]
unsafe fn transpose_eight(rows: [__m256; 8]) -> [__m256; 8] {
    let mut fours = rows;
    let mut columns = rows;
    // SAFETY: the caller's promise.
    unsafe {
        // Half h of `fours[4 i + c]` is column 4 h + c of rows 4 i to 4 i + 3.
        for i in 0..2 {
            let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
            let (ab, cd) =
                (_mm256_castps_pd(_mm256_unpacklo_ps(a, b)), _mm256_castps_pd(_mm256_unpacklo_ps(c, d)));
            fours[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
            fours[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
            let (ab, cd) =
                (_mm256_castps_pd(_mm256_unpackhi_ps(a, b)), _mm256_castps_pd(_mm256_unpackhi_ps(c, d)));
            fours[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
            fours[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
        }
        for c in 0..4 {
            columns[c] = _mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]);
            columns[4 + c] = _mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]);
        }
    }
    columns
}
