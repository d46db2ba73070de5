//! The operations on bytes, pairs and bfloat16, on every instruction set against plain scalar code, in every bit.

use super::*;
use gpt2rs::simd::{BYTES, Kernel, LANES, Simd};
use half::bf16;

/// A kernel of one expression in `$simd`, which may use the instructions for dot products.
macro_rules! kernel {
    ($name:ident { $($field:ident: $type:ty),+ } -> $output:ty, |$simd:ident, $this:ident| $body:expr) => {
        #[derive(Clone, Copy)]
        struct $name<'a> {
            $($field: $type,)+
        }

        impl Kernel for $name<'_> {
            type Output = $output;
            const DOTS: bool = true;

            #[inline(always)]
            fn run<S: Simd>(self, $simd: S) -> $output {
                let $this = self;
                $body
            }
        }
    };
}

/// What a kernel gives on each set, which must be `expected`.
#[track_caller]
fn check<K: Kernel + Copy>(kernel: K, expected: &K::Output)
where
    K::Output: PartialEq + std::fmt::Debug,
{
    for isa in Isa::available() {
        assert_eq!(&isa.run(kernel), expected, "{}", isa.name());
    }
}

#[inline(always)]
fn stored<S: Simd>(simd: S, value: S::F32) -> [u32; LANES] {
    let mut lanes = [0.0; LANES];
    simd.store(value, &mut lanes);
    lanes.map(f32::to_bits)
}

#[inline(always)]
fn integers<S: Simd>(simd: S, lanes: &[i32; LANES]) -> S::I32 {
    simd.as_i32(simd.load(bytemuck::cast_ref(lanes)))
}

kernel!(DotBytes { sum: &'a [i32; LANES], bytes: &'a [u8; BYTES], x: [i8; 4] } -> [i32; LANES], |simd, this| {
    let dot = simd.dot_bytes(integers(simd, this.sum), simd.load_bytes(this.bytes), this.x);
    bytemuck::cast(stored(simd, simd.as_f32(dot)))
});

fn check_dot_bytes(sum: &[i32; LANES], bytes: &[u8; BYTES], x: [i8; 4]) {
    let mut expected = *sum;
    for (lane, sum) in expected.iter_mut().enumerate() {
        *sum += (0..4).map(|i| i32::from(bytes[4 * lane + i]) * i32::from(x[i])).sum::<i32>();
    }
    check(DotBytes { sum, bytes, x }, &expected);
}

/// Two products of the greatest bytes exceed 16 bits: an instruction that adds them there would saturate.
#[test]
fn dot_bytes_saturates_nowhere() {
    for x in [[127; 4], [-128; 4], [127, -128, 127, -128], [-128, -128, 127, 127], [0, 127, -128, 1]] {
        for sum in [0, 1 << 30, -(1 << 30)] {
            check_dot_bytes(&[sum; LANES], &[255; BYTES], x);
            check_dot_bytes(&[sum; LANES], &std::array::from_fn(|i| [255, 0, 128, 127][i % 4]), x);
            check_dot_bytes(&[sum; LANES], &std::array::from_fn(|i| 4 * i as u8), x);
        }
    }
    let mut random = Random(1);
    for _ in 0..2000 {
        let bytes = std::array::from_fn(|_| random.bits() as u8);
        let sum = std::array::from_fn(|_| random.bits() as i32 / 2);
        check_dot_bytes(&sum, &bytes, std::array::from_fn(|_| random.bits() as i8));
    }
}

kernel!(DotI16Pairs { sum: &'a [i32; LANES], pairs: &'a [[i8; 2]; LANES], x: [i16; 2] } -> [i32; LANES], |simd, this| {
    let dot = simd.dot_i16_pairs(integers(simd, this.sum), simd.load_i8_pairs(this.pairs), this.x);
    bytemuck::cast(stored(simd, simd.as_f32(dot)))
});

#[test]
fn dot_i16_pairs_is_exact() {
    let mut random = Random(2);
    let extremes = [-32767i16, -32768, 32767, 0, 1, -1];
    let cases = extremes.iter().flat_map(|&a| extremes.iter().map(move |&b| [a, b]));
    let drawn: Vec<[i16; 2]> = (0..2000).map(|_| std::array::from_fn(|_| random.bits() as i16)).collect();
    for x in cases.chain(drawn) {
        let mut pairs: [[i8; 2]; LANES] =
            std::array::from_fn(|_| std::array::from_fn(|_| random.bits() as i8));
        pairs[..4].copy_from_slice(&[[127, 127], [-128, -128], [-127, 127], [-128, 127]]);
        let sum: [i32; LANES] = std::array::from_fn(|_| random.bits() as i32 / 2);
        let mut expected = sum;
        for (sum, pair) in expected.iter_mut().zip(pairs) {
            *sum += i32::from(pair[0]) * i32::from(x[0]) + i32::from(pair[1]) * i32::from(x[1]);
        }
        check(DotI16Pairs { sum: &sum, pairs: &pairs, x }, &expected);
    }
}

kernel!(LookUp { table: &'a [u8; 16], bytes: &'a [u8; BYTES] } -> [[i32; LANES]; 8], |simd, this| {
    // Bytes come back as products with one, byte by byte.
    let found = simd.look_up(this.table, simd.load_bytes(this.bytes));
    let mut out = [[0; LANES]; 8];
    for half in 0..2 {
        for i in 0..4 {
            let mut one = [0; 4];
            one[i] = 1;
            let byte = simd.dot_bytes(simd.splat_i32(0), found[half], one);
            out[4 * half + i] = bytemuck::cast(stored(simd, simd.as_f32(byte)));
        }
    }
    out
});

#[test]
fn look_up_takes_lower_and_upper_halves() {
    let mut random = Random(3);
    let table: [u8; 16] = std::array::from_fn(|i| 255 - 13 * i as u8);
    for first in (0..256).step_by(BYTES) {
        for bytes in
            [std::array::from_fn(|i| (first + i) as u8), std::array::from_fn(|_| random.bits() as u8)]
        {
            let bytes: [u8; BYTES] = bytes;
            let expected = std::array::from_fn(|i| {
                std::array::from_fn(|lane| {
                    let byte = bytes[4 * lane + i % 4];
                    i32::from(table[usize::from(if i < 4 { byte & 15 } else { byte >> 4 })])
                })
            });
            check(LookUp { table: &table, bytes: &bytes }, &expected);
        }
    }
}

kernel!(Integers { value: &'a [i32; LANES] } -> [[u32; LANES]; 3], |simd, this| {
    let value = integers(simd, this.value);
    [
        stored(simd, simd.to_f32(value)),
        stored(simd, simd.as_f32(value)),
        stored(simd, simd.as_f32(simd.splat_i32(this.value[3]))),
    ]
});

#[test]
fn integers_become_the_nearest_float32() {
    let mut random = Random(4);
    let extremes = [i32::MIN, i32::MAX, 0, -1, (1 << 24) + 1, (1 << 24) + 3, -(1 << 24) - 1, (1 << 25) + 2];
    for round in 0..2000 {
        let value: [i32; LANES] = std::array::from_fn(|lane| match extremes.get(lane) {
            Some(&extreme) if round == 0 => extreme,
            _ => random.bits() as i32 >> (random.bits() % 32),
        });
        let expected = [
            value.map(|value| (value as f32).to_bits()),
            value.map(|value| value as u32),
            [value[3] as u32; LANES],
        ];
        check(Integers { value: &value }, &expected);
    }
}

kernel!(RoundToIntegers { value: &'a [f32; LANES] } -> ([i8; LANES], [i16; LANES]), |simd, this| {
    let (mut narrow, mut wide) = ([99; LANES], [99; LANES]);
    let value = simd.load(this.value);
    simd.round_to_i16(value, &mut wide);
    // What does not fit is not asked for.
    let fits = |value: f32| value.abs() < 127.5;
    if this.value.iter().all(|&value| fits(value)) {
        simd.round_to_i8(value, &mut narrow);
    }
    (narrow, wide)
});

#[test]
fn rounding_to_integers_takes_ties_to_even() {
    let halves = (-65535..65535).map(|halves| halves as f32 / 2.0);
    let mut values: Vec<f32> = halves.flat_map(|tie| [tie.next_down(), tie, tie.next_up()]).collect();
    values.extend([-0.0, f32::MIN_POSITIVE, -f32::from_bits(1), 1e-30, 32767.0, -32767.4, 32767.49]);
    values.resize(values.len().next_multiple_of(LANES), 0.25);
    for value in values.as_chunks::<LANES>().0 {
        let narrow = if value.iter().all(|value| value.abs() < 127.5) {
            value.map(|value| value.round_ties_even() as i8)
        } else {
            [99; LANES]
        };
        check(RoundToIntegers { value }, &(narrow, value.map(|value| value.round_ties_even() as i16)));
    }
}

kernel!(RoundToBf16 { value: &'a [f32; LANES] } -> [u16; LANES], |simd, this| {
    let mut out = [bf16::ZERO; LANES];
    simd.round_to_bf16(simd.load(this.value), &mut out);
    out.map(bf16::to_bits)
});

/// All upper halves with lower halves at and beside zero and the tie: NaN, infinities, subnormals and overflow, too.
#[test]
fn rounding_to_bfloat16_is_to_nearest_even() {
    let values: Vec<f32> = (0..=u16::MAX)
        .flat_map(|upper| {
            [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1234, 0x9abc]
                .map(|lower| f32::from_bits(u32::from(upper) << 16 | lower))
        })
        .collect();
    for value in values.as_chunks::<LANES>().0 {
        for isa in Isa::available() {
            for (&value, out) in value.iter().zip(isa.run(RoundToBf16 { value })) {
                let (expected, out) = (bf16::from_f32(value), bf16::from_bits(out));
                if value.is_nan() {
                    assert!(out.is_nan(), "{}: NaN {:#x} -> {out}", isa.name(), value.to_bits());
                } else {
                    assert_eq!(out.to_bits(), expected.to_bits(), "{}: {value:e}", isa.name());
                }
            }
        }
    }
}

kernel!(RoundToPairs { first: &'a [f32; LANES], second: &'a [f32; LANES] } -> [[bf16; 2]; LANES], |simd, this| {
    let mut out = [[bf16::ZERO; 2]; LANES];
    simd.round_to_pairs(simd.load(this.first), simd.load(this.second), &mut out);
    out
});

/// As [`rounding_to_bfloat16_is_to_nearest_even`] has it, the second of a pair before the first.
#[test]
fn rounding_to_pairs_exchanges_the_two() {
    let mut random = Random(12);
    for _ in 0..2000 {
        let mut value = || f32::from_bits(random.bits() as u32);
        let both: [[f32; LANES]; 2] = std::array::from_fn(|_| std::array::from_fn(|_| value()));
        let expected: [[u16; 2]; LANES] =
            std::array::from_fn(|i| [both[1][i], both[0][i]].map(|value| bf16::from_f32(value).to_bits()));
        for isa in Isa::available() {
            let found = isa.run(RoundToPairs { first: &both[0], second: &both[1] });
            assert_eq!(found.map(|pair| pair.map(bf16::to_bits)), expected, "{}", isa.name());
        }
    }
}

kernel!(Transpose { rows: &'a [[f32; LANES]; LANES] } -> [[u32; LANES]; LANES], |simd, this| {
    let columns = simd.transpose(this.rows.map(|row| simd.load(&row)));
    columns.map(|column| stored(simd, column))
});

#[test]
fn rows_become_columns() {
    let rows = std::array::from_fn(|i| std::array::from_fn(|j| (LANES * i + j) as f32));
    let expected = std::array::from_fn(|j| std::array::from_fn(|i| ((LANES * i + j) as f32).to_bits()));
    check(Transpose { rows: &rows }, &expected);
}

kernel!(Sqrt { values: &'a [f32; LANES] } -> [u32; LANES], |simd, this| {
    stored(simd, simd.sqrt(simd.load(this.values)))
});

#[test]
fn square_roots_are_rounded_once() {
    let mut random = Random(13);
    for _ in 0..2000 {
        let values: [f32; LANES] =
            std::array::from_fn(|_| f32::from_bits(random.bits() as u32 >> 1 & 0x7f7f_ffff));
        check(Sqrt { values: &values }, &values.map(|value| value.sqrt().to_bits()));
    }
}

kernel!(Pairs { pairs: &'a [[bf16; 2]; LANES] } -> [[u32; LANES]; 2], |simd, this| {
    let pairs = simd.load_pairs(this.pairs);
    [stored(simd, simd.first_of_pairs(pairs)), stored(simd, simd.second_of_pairs(pairs))]
});

#[test]
fn pairs_widen_exactly() {
    for start in (0..=u16::MAX).step_by(LANES) {
        let pairs = std::array::from_fn(|lane| {
            let bits = start.wrapping_add(lane as u16);
            [bf16::from_bits(bits), bf16::from_bits(bits.wrapping_mul(40503))]
        });
        let widened = |place: usize| pairs.map(|pair: [bf16; 2]| u32::from(pair[place].to_bits()) << 16);
        check(Pairs { pairs: &pairs }, &[widened(1), widened(0)]);
    }
}

kernel!(DotPairs { sums: &'a [[f32; LANES]], pairs: &'a [[[bf16; 2]; LANES]], x: &'a [[bf16; 2]] } -> Vec<[u32; LANES]>,
|simd, this| {
    let mut out = Vec::with_capacity(this.sums.len());
    for ((sum, pairs), &x) in this.sums.iter().zip(this.pairs).zip(this.x) {
        out.push(stored(simd, simd.dot_pairs(simd.load(sum), simd.load_pairs(pairs), x)));
    }
    out
});

/// Zero of the same sign for a subnormal.
fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0.0f32.copysign(value) } else { value }
}

/// `a * b + c` rounded once, in a mode in which subnormal inputs are zeros, and so are results that, rounded to 24 bits
/// of any exponent, are below the normal numbers. In float64: the product of two bfloat16 is exact, and the sum is
/// rounded to odd, so that rounding it again is rounding once (Boldo and Melquiond, 2008).
pub fn flushing_fma(a: bf16, b: bf16, c: f32) -> f32 {
    let (a, b, c) = (flushed(a.to_f32()), flushed(b.to_f32()), f64::from(flushed(c)));
    let product = f64::from(a) * f64::from(b);
    let sum = product + c;
    if !sum.is_finite() || sum == 0.0 {
        return sum as f32;
    }
    let other = sum - product;
    let error = (product - (sum - other)) + (c - other);
    let mut bits = sum.to_bits();
    if error != 0.0 && bits % 2 == 0 {
        bits = if (error > 0.0) == (sum > 0.0) { bits + 1 } else { bits - 1 };
    }
    // 52 bits of a fraction become 23.
    bits = (bits + 0x0fff_ffff + (bits >> 29 & 1)) & !0x1fff_ffff;
    let rounded = f64::from_bits(bits);
    if rounded.abs() < TINY { 0.0f32.copysign(sum as f32) } else { rounded as f32 }
}

/// Sums and pairs of every kind: any bits, special values, and such that products and sums lie about the smallest
/// normal number.
struct Cases {
    sums: Vec<[f32; LANES]>,
    pairs: Vec<[[bf16; 2]; LANES]>,
    x: Vec<[bf16; 2]>,
}

impl Cases {
    fn new(count: usize, seed: u64) -> Cases {
        let mut random = Random(seed);
        let mut cases = Cases { sums: Vec::new(), pairs: Vec::new(), x: Vec::new() };
        for i in 0..count {
            let kind = i % 4;
            let exponent = random.bits() % 120;
            cases.x.push(std::array::from_fn(|_| narrow(&mut random, kind, 4 + exponent)));
            cases.pairs.push(std::array::from_fn(|_| {
                std::array::from_fn(|_| narrow(&mut random, kind, 122 - exponent))
            }));
            cases.sums.push(std::array::from_fn(|_| {
                let bits = random.bits();
                match kind {
                    0 => f32::from_bits(bits as u32),
                    1 => special(&mut random),
                    // About as large as the products.
                    2 => f32::from_bits(bits as u32 & 0x81ff_ffff),
                    _ => (bits as u32 >> 8) as f32 / (1 << 20) as f32 - 8.0,
                }
            }));
        }
        cases
    }
}

fn special(random: &mut Random) -> f32 {
    let bits = [
        0,
        1,
        0x007f_ffff,
        0x0080_0000,
        0x0080_0001,
        0x7f7f_ffff,
        0x7f80_0000,
        0x7fc0_0000,
        0x7f80_0001,
        0x3f80_0000,
    ];
    let sign = (random.bits() as u32 & 1) << 31;
    f32::from_bits(bits[random.bits() as usize % bits.len()] | sign)
}

fn narrow(random: &mut Random, kind: usize, exponent: u64) -> bf16 {
    let bits = random.bits();
    match kind {
        0 => bf16::from_bits(bits as u16),
        1 => bf16::from_bits((special(random).to_bits() >> 16) as u16),
        2 => bf16::from_bits((bits as u16 & 0x807f) | ((exponent + bits / 256 % 3) as u16) << 7),
        _ => bf16::from_f32((bits >> 40) as f32 / (1 << 23) as f32 - 1.0),
    }
}

/// 6.4 million sums. Of a NaN only that it is one: which of two goes on, and its sign, the sets are free to choose.
#[test]
fn dot_pairs_in_the_flushing_mode_is_the_hardwares() {
    let is_nan = |bits: u32| f32::from_bits(bits).is_nan();
    let (mut near, mut flushed, mut infinite, mut not_numbers) = (0, 0, 0, 0);
    for seed in 0..20 {
        let cases = Cases::new(20_000, seed);
        let Cases { sums, pairs, x } = &cases;
        let mut expected: Vec<[u32; LANES]> = Vec::new();
        for ((sums, pairs), x) in sums.iter().zip(pairs).zip(x) {
            expected.push(std::array::from_fn(|lane| {
                let sum = flushing_fma(pairs[lane][1], x[1], sums[lane]);
                flushing_fma(pairs[lane][0], x[0], sum).to_bits()
            }));
        }
        for &bits in expected.as_flattened() {
            let value = f32::from_bits(bits);
            near += usize::from(value.is_normal() && value.abs() < 4.0 * f32::MIN_POSITIVE);
            flushed += usize::from(value == 0.0);
            infinite += usize::from(value.is_infinite());
            not_numbers += usize::from(value.is_nan());
        }
        for isa in Isa::available() {
            let found = isa.run_flushing(DotPairs { sums, pairs, x });
            for (i, (&found, &expected)) in
                found.as_flattened().iter().zip(expected.as_flattened()).enumerate()
            {
                assert!(
                    found == expected || is_nan(found) && is_nan(expected),
                    "{}: {found:#010x}, not {expected:#010x}: {:?} . {:?} + {:#010x}",
                    isa.name(),
                    pairs[i / LANES][i % LANES].map(|value| format!("{:#06x}", value.to_bits())),
                    x[i / LANES].map(|value| format!("{:#06x}", value.to_bits())),
                    sums[i / LANES][i % LANES].to_bits(),
                );
            }
        }
    }
    for (what, count) in
        [("near", near), ("flushed", flushed), ("infinite", infinite), ("not numbers", not_numbers)]
    {
        assert!(count > 10_000, "{count} results {what}");
    }
}
