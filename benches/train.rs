//! Training steps of 124M from random weights, beside the limit of this machine in the same run, part by part.
//!
//! `cargo bench --bench train -- [--quick] [--threads N] [--precision float32|bfloat16] [--recompute]`
//!
//! A shared machine changes from one second to the next, so every step is measured between two probes of the machine.

use gpt2rs::config::Config;
use gpt2rs::error::Result;
use gpt2rs::pool::default_threads;
use gpt2rs::probe::{dot_bf16_peak, fma_peak};
use gpt2rs::simd::Isa;
use gpt2rs::train::{Batch, Options, Pass, Precision, Trainer, Update};
use gpt2rs::weights::Origin;
use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "usage: cargo bench --bench train -- [--quick] [--threads N] [--precision float32|bfloat16] [--recompute]";

const COUNTING: &str = "\
a step: forward, backward, clipping and AdamW of one micro-batch
flops of a step: three times those of the forward pass, which has 2 for each multiply-add of the blocks' matrices, of the
  LM head for every token, and of causal attention (q k and p v over the positions up to each); what is computed again
  counts for nothing
of the limit: rate over the mean of the probes (fused multiply-adds, or with bfloat16 dot products of pairs) just before
  and just after the step";

/// (B, T) of the steps that are measured.
const BATCHES: [(usize, usize); 2] = [(4, 64), (1, 1024)];

#[derive(Clone, Copy)]
struct Arguments {
    quick: bool,
    n_threads: usize,
    precision: Precision,
    recompute: bool,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> std::result::Result<Arguments, String> {
        let n_threads = default_threads(usize::MAX);
        let mut arguments =
            Arguments { quick: false, n_threads, precision: Precision::Float32, recompute: false };
        while let Some(word) = words.next() {
            match word.as_str() {
                "--quick" => arguments.quick = true,
                "--recompute" => arguments.recompute = true,
                "--threads" => {
                    let count = words.next().and_then(|word| word.parse().ok()).filter(|&count| count > 0);
                    arguments.n_threads = count.ok_or("--threads: a number above 0 is missing")?;
                }
                "--precision" => {
                    arguments.precision = match words.next().as_deref() {
                        Some("float32") => Precision::Float32,
                        Some("bfloat16") => Precision::Bfloat16,
                        _ => return Err("--precision: it must be float32 or bfloat16".to_owned()),
                    }
                }
                // What cargo adds.
                "--bench" => {}
                other => return Err(format!("{other}: unknown")),
            }
        }
        Ok(arguments)
    }

    fn limit(self, isa: Isa) -> Result<f64> {
        match self.precision {
            Precision::Float32 => fma_peak(isa, self.n_threads),
            Precision::Bfloat16 => dot_bf16_peak(isa, self.n_threads),
        }
    }
}

/// Floating-point operations of a step, as [`COUNTING`] says.
fn flops(config: &Config, batch_size: usize, n_tokens: usize) -> f64 {
    let &Config { n_layer, n_embd, n_vocab, .. } = config;
    let matrices: usize = config.block_matrices().iter().map(|(k, n)| k * n).sum();
    let attention = n_embd * n_tokens * (n_tokens + 1);
    let forward = n_tokens * (n_layer * matrices + n_vocab * n_embd) + n_layer * attention;
    (3 * 2 * batch_size * forward) as f64
}

/// Median (minimum, maximum).
fn spread(values: &[f64], digits: usize) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    format!(
        "{:.digits$} ({:.digits$}, {:.digits$})",
        sorted[sorted.len() / 2],
        sorted[0],
        sorted[sorted.len() - 1]
    )
}

fn measure(arguments: Arguments) -> Result<()> {
    let Arguments { n_threads, precision, recompute, .. } = arguments;
    let (isa, rounds) = (Isa::from_env()?, if arguments.quick { 3 } else { 7 });
    println!("gpt2 (124M), {precision:?}; {}; {n_threads} threads; {rounds} rounds\n", isa.name());
    println!(
        "{:<10} {:<22} {:<22} {:<24} {:<16} forward+backward, update: s",
        "B x T", "tokens/s", "GFLOP/s", "limit, GFLOP/s", "% of the limit"
    );
    for (batch_size, n_tokens) in BATCHES {
        let options = Options {
            precision,
            recompute,
            n_threads: Some(n_threads),
            isa: Some(isa),
            ..Options::new(batch_size, n_tokens)
        };
        let mut trainer = Trainer::new(Config::preset("gpt2")?, &Origin::Random { seed: 1 }, options)?;
        let flops = flops(trainer.config(), batch_size, n_tokens);
        let n_vocab = trainer.config().n_vocab;
        let ids: Vec<u32> = (0..=batch_size * n_tokens).map(|i| (7919 * i % n_vocab) as u32).collect();
        let batch = Batch { inputs: &ids[..ids.len() - 1], targets: &ids[1..], n_tokens };
        let mut step = 0;
        let mut run = || -> Result<[f64; 2]> {
            step += 1;
            let start = Instant::now();
            trainer.accumulate(batch, Pass { step, micro_step: 0, scale: 1.0 }, &|| true)?;
            let passed = start.elapsed().as_secs_f64();
            let (betas, max_norm) = ((0.9, 0.95), Some(1.0));
            trainer.update(Update { lr: 1e-5, step, betas, eps: 1e-8, weight_decay: 0.1, max_norm })?;
            Ok([passed, start.elapsed().as_secs_f64() - passed])
        };
        run()?;
        let [mut tokens, mut rates, mut limits, mut shares, mut passes, mut updates] =
            [const { Vec::new() }; 6];
        let mut before = arguments.limit(isa)?;
        for _ in 0..rounds {
            let [pass, update] = run()?;
            let after = arguments.limit(isa)?;
            let (seconds, limit) = (pass + update, (before + after) / 2.0);
            tokens.push((batch_size * n_tokens) as f64 / seconds);
            rates.push(flops / seconds / 1e9);
            limits.push(limit / 1e9);
            shares.push(100.0 * flops / seconds / limit);
            passes.push(pass);
            updates.push(update);
            before = after;
        }
        println!(
            "{:<10} {:<22} {:<22} {:<24} {:<16} {}, {}",
            format!("{batch_size} x {n_tokens}"),
            spread(&tokens, 0),
            spread(&rates, 1),
            spread(&limits, 1),
            spread(&shares, 0),
            spread(&passes, 3),
            spread(&updates, 3),
        );
    }
    println!("\n{COUNTING}");
    Ok(())
}

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match measure(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
