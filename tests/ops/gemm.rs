//! `a @ b` of row-major matrices, either of them transposed.

use super::*;
use gpt2rs::ops::Rows;
use gpt2rs::ops::gemm::{Gemm, Operand, Precision, Scratch};
use gpt2rs::pool::Columns;
use half::bf16;
use proptest::prelude::*;

/// A matrix, held as it is or as its columns.
struct Factor {
    rows: usize,
    columns: usize,
    transposed: bool,
    /// (rows, columns), row-major.
    values: Vec<f32>,
    held: Vec<f32>,
    stride: usize,
}

impl Factor {
    fn new(values: Vec<f32>, columns: usize, transposed: bool, gap: usize) -> Factor {
        let rows = values.len() / columns;
        let (lines, length) = if transposed { (columns, rows) } else { (rows, columns) };
        let stride = length + gap;
        let mut held = vec![FORBIDDEN; lines * stride];
        for i in 0..rows {
            for j in 0..columns {
                held[if transposed { j * stride + i } else { i * stride + j }] = values[i * columns + j];
            }
        }
        Factor { rows, columns, transposed, values, held, stride }
    }

    fn operand(&self) -> Operand<'_> {
        if self.transposed {
            Operand::transposed(Rows::new(&self.held, self.stride, self.rows))
        } else {
            Operand::of(Rows::new(&self.held, self.stride, self.columns))
        }
    }

    fn value(&self, i: usize, j: usize) -> f32 {
        self.values[i * self.columns + j]
    }
}

struct Case {
    a: Factor,
    b: Factor,
    bias: Vec<f32>,
    /// What the output holds before, where it is added to.
    before: Option<Vec<f32>>,
}

impl Case {
    fn compute(&self, isa: Isa, precision: Precision, threads: usize) -> Vec<f32> {
        let (m, k, n) = (self.a.rows, self.a.columns, self.b.columns);
        let mut out = self.before.clone().unwrap_or(vec![FORBIDDEN; m * n]);
        // Cut inside of panels, too: no cut may change a bit.
        let ranges = (0..threads).map(|i| n * i / threads..n * (i + 1) / threads);
        for out in Columns::split(&mut out, n, m, ranges) {
            let (a, b, adds) = (self.a.operand(), self.b.operand(), self.before.is_some());
            Gemm { a, b, k, adds, bias: &self.bias, out }.run(isa, precision, &mut Scratch::new());
        }
        out
    }

    /// One chain of fused multiply-adds over k ascending, from zero or from what was there; then the bias.
    fn expected(&self) -> Vec<f32> {
        let (m, n) = (self.a.rows, self.b.columns);
        let chain = |i: usize| {
            let (row, column) = (i / n, i % n);
            let before = self.before.as_ref().map_or(0.0, |before| before[i]);
            let terms = (0..self.a.columns).map(|k| (self.a.value(row, k), self.b.value(k, column)));
            let sum = terms.fold(before, |sum, (a, b)| a.mul_add(b, sum));
            sum + self.bias.get(column).unwrap_or(&0.0)
        };
        (0..m * n).map(chain).collect()
    }
}

fn case(m: usize, k: usize, n: usize, ways: u32, gaps: [usize; 2], seed: u64) -> Case {
    let mut random = Random(seed);
    Case {
        a: Factor::new(random.values(m * k, 1.0), k, ways & 1 > 0, gaps[0]),
        b: Factor::new(random.values(k * n, 1.0), n, ways & 2 > 0, gaps[1]),
        bias: random.values(if ways & 4 > 0 { n } else { 0 }, 1.0),
        before: (ways & 8 > 0).then(|| random.values(m * n, 1.0)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bits, not a bound: the chain is the contract.
    #[test]
    fn any_product(
        m in 1usize..=40, k in 1usize..=50, n in 1usize..=70, ways in 0u32..16,
        gaps in prop::array::uniform2(0usize..4), threads in 1usize..4, seed: u64,
    ) {
        let case = case(m, k, n, ways, gaps, seed);
        let found = on_every_isa(|isa| case.compute(isa, Precision::Float32, threads));
        prop_assert_eq!(bits(&found), bits(&case.expected()));
    }

    #[test]
    fn bfloat16_factors(
        m in 1usize..=40, k in 1usize..=50, n in 1usize..=70, ways in 0u32..16,
        gaps in prop::array::uniform2(0usize..4), seed: u64,
    ) {
        let mut case = case(m, k, n, ways, gaps, seed);
        let found = on_every_isa(|isa| case.compute(isa, Precision::Bfloat16, 2));
        for factor in [&mut case.a, &mut case.b] {
            factor.values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
        // Nothing here is subnormal, so that the flushing mode changes nothing.
        prop_assert_eq!(bits(&found), bits(&case.expected()));
    }
}

/// Larger than a piece of every kind: of k, of columns, of rows.
#[test]
fn large_products_are_the_same_chains() {
    for (ways, (m, k, n)) in [(0, (300, 1700, 33)), (11, (250, 800, 600)), (6, (15, 1540, 1100))] {
        let case = case(m, k, n, ways, [0, 16], 5);
        let isa = *Isa::available().last().unwrap();
        assert_eq!(bits(&case.compute(isa, Precision::Float32, 2)), bits(&case.expected()), "{ways}");
    }
}
