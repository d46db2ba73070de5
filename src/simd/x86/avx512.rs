//! AVX-512, its VNNI and BF16.

use super::Avx512;
use crate::simd::{BYTES, LANES, Simd};
use half::bf16;
use std::arch::x86_64::*;

// Each block below is one or a few intrinsics on registers or on arrays that are borrowed for their whole length, and
// `self` proves that the features are there.
impl<const VNNI: bool, const BF16: bool> Simd for Avx512<VNNI, BF16> {
    type F32 = __m512;
    type I32 = __m512i;
    type Bytes = __m512i;
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
    fn load_pairs(self, pairs: &[[bf16; 2]; LANES]) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F; the load is the sixteen pairs.
        unsafe { _mm512_loadu_ps(pairs.as_ptr().cast()) }
    }
    #[inline(always)]
    fn first_of_pairs(self, pairs: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F and BW. By a mask register: there are none too many of the others.
        unsafe { _mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xaaaa_aaaa, _mm512_castps_si512(pairs))) }
    }
    #[inline(always)]
    fn second_of_pairs(self, pairs: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(pairs))) }
    }
    #[inline(always)]
    fn dot_pairs(self, sum: Self::F32, pairs: Self::F32, x: [bf16; 2]) -> Self::F32 {
        if BF16 {
            let x: i32 = bytemuck::cast(x);
            // SAFETY: `self` proves AVX-512 F and BF16; __m512bh are 512 bits like any other.
            return unsafe {
                let pairs = std::mem::transmute::<__m512, __m512bh>(pairs);
                let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x));
                _mm512_dpbf16_ps(sum, pairs, x)
            };
        }
        let [second, first] = x;
        let sum = self.fma(self.first_of_pairs(pairs), self.splat(first.to_f32()), sum);
        self.fma(self.second_of_pairs(pairs), self.splat(second.to_f32()), sum)
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
    fn fma_from(self, x: &f32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { fma_from(x, b, c) }
    }
    #[inline(always)]
    fn sqrt(self, value: Self::F32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_sqrt_ps(value) }
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::F32; LANES]) -> [Self::F32; LANES] {
        let mut fours = rows;
        let mut columns = rows;
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            // Quarter q of `fours[4 i + c]` is column 4 q + c of rows 4 i to 4 i + 3.
            for i in 0..4 {
                let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
                let (ab, cd) =
                    (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d)));
                fours[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                fours[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
                let (ab, cd) =
                    (_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d)));
                fours[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                fours[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            }
            for c in 0..4 {
                let [r0, r4, r8, r12] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
                let (even, odd) =
                    (_mm512_shuffle_f32x4::<0x88>(r0, r4), _mm512_shuffle_f32x4::<0xdd>(r0, r4));
                let (even_8, odd_8) =
                    (_mm512_shuffle_f32x4::<0x88>(r8, r12), _mm512_shuffle_f32x4::<0xdd>(r8, r12));
                columns[c] = _mm512_shuffle_f32x4::<0x88>(even, even_8);
                columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd, odd_8);
                columns[8 + c] = _mm512_shuffle_f32x4::<0xdd>(even, even_8);
                columns[12 + c] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_8);
            }
        }
        columns
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
    fn splat_i32(self, value: i32) -> Self::I32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    fn load_i8(self, lanes: &[i8; LANES]) -> Self::I32 {
        // SAFETY: `self` proves AVX-512 F; the load is the sixteen lanes.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(lanes.as_ptr().cast())) }
    }
    #[inline(always)]
    fn mul_add_i32(self, a: Self::I32, b: Self::I32, c: Self::I32) -> Self::I32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_epi32(_mm512_mullo_epi32(a, b), c) }
    }
    #[inline(always)]
    fn to_f32(self, value: Self::I32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_cvtepi32_ps(value) }
    }
    #[inline(always)]
    fn as_i32(self, bits: Self::F32) -> Self::I32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_castps_si512(bits) }
    }
    #[inline(always)]
    fn as_f32(self, bits: Self::I32) -> Self::F32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_castsi512_ps(bits) }
    }
    #[inline(always)]
    fn load_bytes(self, bytes: &[u8; BYTES]) -> Self::Bytes {
        // SAFETY: `self` proves AVX-512 F; the load is the 64 bytes.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::Bytes) -> [Self::Bytes; 2] {
        // SAFETY: `self` proves AVX-512 F and BW; the load is the table. Shuffles look up within quarters of a register,
        // so each quarter has the table; masked indices are below 16.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            let nibble = _mm512_set1_epi8(15);
            [
                _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, nibble)),
                _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble)),
            ]
        }
    }
    #[inline(always)]
    fn dot_bytes(self, sum: Self::I32, bytes: Self::Bytes, x: [i8; 4]) -> Self::I32 {
        // SAFETY: `self` proves AVX-512 F and BW, and VNNI where VNNI says so.
        unsafe {
            let x = _mm512_set1_epi32(i32::from_le_bytes(bytemuck::cast(x)));
            if VNNI {
                return _mm512_dpbusd_epi32(sum, bytes, x);
            }
            // Products of 16-bit values: those of bytes by the instruction made for them may saturate.
            let (x_even, x_odd) =
                (_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x)), _mm512_srai_epi16::<8>(x));
            let evens = _mm512_madd_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), x_even);
            let odds = _mm512_madd_epi16(_mm512_srli_epi16::<8>(bytes), x_odd);
            _mm512_add_epi32(sum, _mm512_add_epi32(evens, odds))
        }
    }
    #[inline(always)]
    fn load_i8_pairs(self, pairs: &[[i8; 2]; LANES]) -> Self::I32 {
        // SAFETY: `self` proves AVX-512 F and BW; the load is the sixteen pairs.
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(pairs.as_ptr().cast())) }
    }
    #[inline(always)]
    fn dot_i16_pairs(self, sum: Self::I32, pairs: Self::I32, x: [i16; 2]) -> Self::I32 {
        // SAFETY: `self` proves AVX-512 F and BW, and VNNI where VNNI says so.
        unsafe {
            let x = _mm512_set1_epi32(bytemuck::cast(x));
            if VNNI {
                return _mm512_dpwssd_epi32(sum, pairs, x);
            }
            _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, x))
        }
    }
    #[inline(always)]
    fn round_to_i8(self, value: Self::F32, out: &mut [i8; LANES]) {
        // SAFETY: `self` proves AVX-512 F; the store is the sixteen lanes.
        unsafe {
            let packed = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value));
            _mm_storeu_si128(out.as_mut_ptr().cast(), packed);
        }
    }
    #[inline(always)]
    fn round_to_i16(self, value: Self::F32, out: &mut [i16; LANES]) {
        // SAFETY: `self` proves AVX-512 F; the store is the sixteen lanes.
        unsafe {
            let packed = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(value));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), packed);
        }
    }
    #[inline(always)]
    fn round_to_pairs(self, first: Self::F32, second: Self::F32, out: &mut [[bf16; 2]; LANES]) {
        // SAFETY: `self` proves AVX-512 F; the store is the sixteen pairs.
        unsafe {
            let upper = _mm512_and_si512(nearest_bf16(first), _mm512_set1_epi32(0xffff_0000_u32 as i32));
            let lower = _mm512_srli_epi32::<16>(nearest_bf16(second));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_or_si512(upper, lower));
        }
    }
    #[inline(always)]
    fn round_to_bf16(self, value: Self::F32, out: &mut [bf16; LANES]) {
        // SAFETY: `self` proves AVX-512 F; the store is the sixteen lanes.
        unsafe {
            let packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(nearest_bf16(value)));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), packed);
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

/// The nearest bfloat16 in the upper halves, ties to even: by adding just less than half of the last place kept, or half
/// where that place is odd. A NaN keeps its upper half, made quiet. The lower halves are anything.
///
/// # Safety
/// The machine must have AVX-512 F.
#[inline(always)]
unsafe fn nearest_bf16(value: __m512) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm512_castps_si512(value);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000))
    }
}

/// `x * b + c` in one instruction.
#[inline]
#[target_feature(enable = "avx512f")]
fn fma_from(x: &f32, b: __m512, mut c: __m512) -> __m512 {
    // SAFETY: the instruction reads the four bytes of `x`, and changes nothing but `c` and flags of exceptions.
    unsafe {
        std::arch::asm!(
            "vfmadd231ps {c}, {b}, dword ptr [{x}]{{1to16}}",
            c = inout(zmm_reg) c,
            b = in(zmm_reg) b,
            x = in(reg) x,
            options(pure, readonly, nostack)
        );
    }
    c
}
