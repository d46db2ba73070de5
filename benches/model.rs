//! Whole-model figures on random weights of 124M, beside the limits of this machine in the same run.
//!
//! `cargo bench --bench model -- [--quick] [--threads 1,2] [--dtype float32]`
//!
//! A shared machine changes from one second to the next, so everything is measured in rounds, with probes of the
//! machine between: a share of a limit is a rate over the mean of the probes just before and just after it.

use gpt2rs::config::{Config, Precision};
use gpt2rs::error::Result;
use gpt2rs::kv_cache::KvCache;
use gpt2rs::model::{MAX_ROWS, Model, Options, Run, Wanted};
use gpt2rs::ops::attention::{BLOCK, block_bytes};
use gpt2rs::ops::pairs::{Bf16, F32, Int8};
use gpt2rs::pool::default_threads;
use gpt2rs::probe::{Bandwidth, dot_bf16_peak, dot_int8_peak, fma_peak};
use gpt2rs::simd::Isa;
use gpt2rs::weights::{Dtype, Origin};
use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "usage: cargo bench --bench model -- [--quick] [--threads N,...] [--dtype float32|bfloat16|bfloat16/fast|int8|int4,...]";

const COUNTING: &str = "\
bytes of a decode step: the packed weights but position embeddings, once, and keys and values of the positions
  attended to, for each sequence; scales of groups and of positions included
flops of a prefill: 2 for each multiply-add of the blocks' matrices, of causal attention (q k and p v over the
  positions up to each), and of the LM head for one row; against the peak of what the matrices' products use
of the limit: rate over the mean of the probes (the best of three each) just before and just after it
of one: tokens/s over those of one sequence after 32 in the same round";

/// What is measured; sizes in tokens.
#[derive(Clone, Copy)]
enum Work {
    /// `steps` tokens of each of `sequences`, after `context` tokens.
    Decode { sequences: usize, context: usize, steps: usize },
    /// A prompt, with the logits of its last token.
    Prefill { tokens: usize },
}

/// What the machine can do that work is held against.
#[derive(Clone, Copy, PartialEq)]
enum Limit {
    /// Bytes a second.
    Reading,
    /// Operations a second: of fused multiply-adds, or of dot products of bfloat16 or of bytes.
    Fma,
    DotBf16,
    DotInt8,
}

impl Limit {
    const ALL: [Limit; 4] = [Limit::Reading, Limit::Fma, Limit::DotBf16, Limit::DotInt8];

    fn name(self) -> &'static str {
        match self {
            Limit::Reading => "read bandwidth",
            Limit::Fma => "fused multiply-adds",
            Limit::DotBf16 => "dot products of bfloat16",
            Limit::DotInt8 => "dot products of int8",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Limit::Reading => "GB/s",
            Limit::Fma | Limit::DotBf16 => "GFLOP/s",
            Limit::DotInt8 => "GOP/s",
        }
    }

    /// What the products of a model's prefill are bound by.
    fn of_products(kind: Kind) -> Limit {
        match kind {
            Kind { dtype: Dtype::Int8 | Dtype::Int4, .. } => Limit::DotInt8,
            Kind { precision: Precision::Fast, .. } => Limit::DotBf16,
            _ => Limit::Fma,
        }
    }
}

/// How a model is held and run.
#[derive(Clone, Copy)]
struct Kind {
    dtype: Dtype,
    precision: Precision,
}

impl Kind {
    const NAMES: [&str; 5] = ["float32", "bfloat16", "bfloat16/fast", "int8", "int4"];

    /// `int8`, `bfloat16/fast` and the like.
    fn from_name(name: &str) -> Result<Kind> {
        let (dtype, precision) = name.split_once('/').unwrap_or((name, Precision::Exact.name()));
        let dtype = Dtype::from_name(dtype)?;
        Ok(Kind { dtype, precision: Precision::from_name(precision, dtype)? })
    }

    fn of(model: &Model) -> Kind {
        Kind { dtype: model.dtype(), precision: model.precision() }
    }

    fn name(self) -> String {
        match self.precision {
            Precision::Exact => self.dtype.name().to_owned(),
            Precision::Fast => format!("{}/{}", self.dtype.name(), self.precision.name()),
        }
    }
}

/// Bytes of a position's keys and values.
fn position_bytes(model: &Model) -> usize {
    let config = model.config();
    let hs = config.head_size();
    let block = match model.kv_dtype() {
        Dtype::F32 => block_bytes::<F32>(hs),
        Dtype::BF16 => block_bytes::<Bf16>(hs),
        Dtype::Int8 => block_bytes::<Int8>(hs),
        Dtype::Int4 => unreachable!("no cache is held in int4"),
    };
    config.n_layer * config.n_head * block / BLOCK
}

impl Work {
    /// All works; the first one is what the others' tokens/s are compared with.
    fn all(quick: bool) -> [Work; 5] {
        let steps = if quick { 16 } else { 64 };
        [
            Work::Decode { sequences: 1, context: 32, steps },
            Work::Decode { sequences: 1, context: 896, steps },
            Work::Decode { sequences: 8, context: 32, steps: steps / 2 },
            Work::Prefill { tokens: 512 },
            Work::Prefill { tokens: 1000 },
        ]
    }

    fn name(self) -> String {
        match self {
            Work::Decode { sequences: 1, context, steps } => format!("decode {steps} after {context}"),
            Work::Decode { sequences, context, steps } => {
                format!("{sequences} together, {steps} after {context}")
            }
            Work::Prefill { tokens } => format!("prefill {tokens}"),
        }
    }

    fn limit(self, kind: Kind) -> Limit {
        match self {
            Work::Decode { .. } => Limit::Reading,
            Work::Prefill { .. } => Limit::of_products(kind),
        }
    }

    /// Tokens that go through the model.
    fn tokens(self) -> usize {
        match self {
            Work::Decode { sequences, steps, .. } => sequences * steps,
            Work::Prefill { tokens } => tokens,
        }
    }

    /// Bytes that have to be read, or operations that have to be done, as [`COUNTING`] says.
    fn amount(self, model: &Model) -> f64 {
        let &Config { n_layer, n_embd, n_vocab, .. } = model.config();
        match self {
            Work::Decode { sequences, context, steps } => {
                let weights = model.weights().bytes() - size_of_val(model.weights().wpe.as_slice());
                // Step i of 1..=steps attends to context + i positions.
                let positions = steps * context + steps * (steps + 1) / 2;
                (steps * weights + sequences * positions * position_bytes(model)) as f64
            }
            Work::Prefill { tokens } => {
                let matrices: usize = model.config().block_matrices().iter().map(|(k, n)| k * n).sum();
                let attention = n_embd * tokens * (tokens + 1);
                (2 * (n_layer * (tokens * matrices + attention) + n_vocab * n_embd)) as f64
            }
        }
    }
}

/// The limits of the machine on a number of threads, and what they were each time.
struct Machine {
    isa: Isa,
    n_threads: usize,
    bandwidth: Bandwidth,
    rates: [Vec<f64>; 4],
}

impl Machine {
    fn new(isa: Isa, n_threads: usize) -> Result<Machine> {
        Ok(Machine { isa, n_threads, bandwidth: Bandwidth::new(isa, n_threads)?, rates: Default::default() })
    }

    fn probe(&mut self, limit: Limit) -> Result<f64> {
        let rate = match limit {
            Limit::Reading => (0..3).map(|_| self.bandwidth.measure()).fold(0.0, f64::max),
            Limit::Fma => fma_peak(self.isa, self.n_threads)?,
            Limit::DotBf16 => dot_bf16_peak(self.isa, self.n_threads)?,
            Limit::DotInt8 => dot_int8_peak(self.isa, self.n_threads)?,
        };
        self.rates[limit as usize].push(rate);
        Ok(rate)
    }
}

/// A work and what it gave in each round.
struct Figure {
    work: Work,
    /// Prefilled caches, one for each sequence, that every round forks.
    prompts: Vec<KvCache>,
    tokens_per_second: Vec<f64>,
    /// Bytes or operations a second.
    rates: Vec<f64>,
    /// `rates` over the probes beside them.
    shares: Vec<f64>,
}

impl Figure {
    /// Computes the prompts, and runs the work once to warm up.
    fn new(work: Work, model: &Model) -> Result<Figure> {
        let (sequences, context) = match work {
            Work::Decode { sequences, context, .. } => (sequences, context),
            Work::Prefill { .. } => (0, 0),
        };
        let mut prompts: Vec<KvCache> = (0..sequences).map(|_| model.new_cache()).collect();
        for (i, cache) in prompts.iter_mut().enumerate() {
            prefill(model, cache, &token_ids(model, context, i))?;
        }
        let (tokens_per_second, rates, shares) = (Vec::new(), Vec::new(), Vec::new());
        let figure = Figure { work, prompts, tokens_per_second, rates, shares };
        figure.time(model)?;
        Ok(figure)
    }

    /// Seconds that the work takes.
    fn time(&self, model: &Model) -> Result<f64> {
        let seconds = match self.work {
            Work::Decode { sequences, steps, .. } => {
                let mut caches = self.prompts.clone();
                let mut logits = vec![0.0; sequences * model.config().n_vocab];
                let tokens = token_ids(model, steps, sequences);
                let start = Instant::now();
                for token in tokens.chunks(1) {
                    let runs = caches.iter_mut().map(|cache| Run { tokens: token, cache, wanted: 1 });
                    model.forward(&mut runs.collect::<Vec<_>>(), Wanted::Last(&mut logits), &|| true)?;
                }
                start.elapsed()
            }
            Work::Prefill { tokens } => {
                let tokens = token_ids(model, tokens, 0);
                let mut cache = model.new_cache();
                let start = Instant::now();
                prefill(model, &mut cache, &tokens)?;
                start.elapsed()
            }
        };
        Ok(seconds.as_secs_f64())
    }
}

/// Any ids do; the step is odd and not small, so that they are spread over the vocabulary.
fn token_ids(model: &Model, count: usize, start: usize) -> Vec<u32> {
    (0..count).map(|i| ((start + 7919 * i) % model.config().n_vocab) as u32).collect()
}

/// Appends tokens to a cache and computes the last one's logits, in passes as `session::prefill` makes them.
fn prefill(model: &Model, cache: &mut KvCache, tokens: &[u32]) -> Result<()> {
    let mut logits = vec![0.0; model.config().n_vocab];
    let end = cache.len() + tokens.len();
    for tokens in tokens.chunks(MAX_ROWS) {
        let wanted = usize::from(cache.len() + tokens.len() == end);
        let logits = if wanted == 1 { &mut logits[..] } else { &mut [] };
        model.forward(&mut [Run { tokens, cache, wanted }], Wanted::Last(logits), &|| true)?;
    }
    Ok(())
}

/// Measures each figure once, with probes between.
fn round(model: &Model, figures: &mut [Figure], machine: &mut Machine) -> Result<()> {
    let kind = Kind::of(model);
    for limit in [Limit::Reading, Limit::of_products(kind)] {
        let mut before = machine.probe(limit)?;
        for figure in figures.iter_mut().filter(|figure| figure.work.limit(kind) == limit) {
            let seconds = figure.time(model)?;
            let after = machine.probe(limit)?;
            let rate = figure.work.amount(model) / seconds;
            figure.tokens_per_second.push(figure.work.tokens() as f64 / seconds);
            figure.rates.push(rate);
            figure.shares.push(2.0 * rate / (before + after));
            before = after;
        }
    }
    Ok(())
}

/// Median (minimum, maximum).
fn spread(values: impl Iterator<Item = f64>, digits: usize) -> String {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let (middle, last) = (sorted.len() / 2, sorted.len() - 1);
    // Of an even number, the mean of the two in the middle.
    let median = (sorted[middle] + sorted[last - middle]) / 2.0;
    format!("{median:.digits$} ({:.digits$}, {:.digits$})", sorted[0], sorted[last])
}

fn print_row([dtype, threads, work, tokens, rate, share, of_one]: [&str; 7]) {
    let row = format!("{dtype:<13} {threads:>7}  {work:<25} {tokens:<25} {rate:<31} {share:<14} {of_one}");
    println!("{}", row.trim_end());
}

fn print_figures(model: &Model, figures: &[Figure]) {
    let (threads, kind) = (model.n_threads().to_string(), Kind::of(model));
    for figure in figures {
        let Figure { work, tokens_per_second, rates, shares, .. } = figure;
        let rates = spread(rates.iter().map(|rate| rate / 1e9), 1);
        let limit = work.limit(kind);
        let of_one = tokens_per_second.iter().zip(&figures[0].tokens_per_second).map(|(all, one)| all / one);
        print_row([
            &kind.name(),
            &threads,
            &work.name(),
            &spread(tokens_per_second.iter().copied(), 1),
            &format!("{rates} {}", limit.unit()),
            &spread(shares.iter().map(|share| 100.0 * share), 0),
            &if limit == Limit::Reading { spread(of_one, 2) } else { String::new() },
        ]);
    }
}

fn print_limits(machine: &Machine) {
    for limit in Limit::ALL.into_iter().filter(|&limit| !machine.rates[limit as usize].is_empty()) {
        let rates = spread(machine.rates[limit as usize].iter().map(|rate| rate / 1e9), 1);
        let rate = format!("{rates} {}", limit.unit());
        print_row(["limit", &machine.n_threads.to_string(), limit.name(), "", &rate, "", ""]);
    }
}

struct Arguments {
    quick: bool,
    threads: Vec<usize>,
    kinds: Vec<Kind>,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> std::result::Result<Arguments, String> {
        let mut threads = vec![1, default_threads(usize::MAX)];
        threads.dedup();
        let kinds = Kind::NAMES.map(|name| Kind::from_name(name).expect("these are known")).to_vec();
        let mut arguments = Arguments { quick: false, threads, kinds };
        while let Some(word) = words.next() {
            match word.as_str() {
                "--quick" => arguments.quick = true,
                "--threads" => {
                    let counts = words.next().ok_or("--threads: a number is missing")?;
                    let count = |word: &str| word.parse().ok().filter(|&count| count > 0);
                    arguments.threads = counts
                        .split(',')
                        .map(|word| {
                            count(word).ok_or_else(|| format!("--threads: {word:?} is no number of threads"))
                        })
                        .collect::<std::result::Result<_, _>>()?;
                }
                "--dtype" => {
                    let names = words.next().ok_or("--dtype: a name is missing")?;
                    let kinds: Result<_> = names.split(',').map(Kind::from_name).collect();
                    arguments.kinds = kinds.map_err(|error| format!("--dtype: {error}"))?;
                }
                // What cargo adds.
                "--bench" => {}
                other => return Err(format!("{other}: unknown")),
            }
        }
        Ok(arguments)
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let isa = Isa::from_env()?;
    let rounds = if arguments.quick { 3 } else { 7 };
    println!("gpt2 (124M), random weights; {}; median (minimum, maximum) of {rounds} rounds\n", isa.name());
    print_row(["dtype", "threads", "work", "tokens/s", "rate", "% of the limit", "of one"]);
    for &n_threads in &arguments.threads {
        let mut machine = Machine::new(isa, n_threads)?;
        let mut benches = Vec::new();
        for &Kind { dtype, precision } in &arguments.kinds {
            let n_threads = Some(n_threads);
            let options = Options { dtype, precision, n_threads, isa: Some(isa), kv_dtype: None };
            let model = Model::new(Config::preset("gpt2")?, Origin::Random { seed: 1 }, options)?;
            let figures: Result<Vec<Figure>> =
                Work::all(arguments.quick).into_iter().map(|work| Figure::new(work, &model)).collect();
            benches.push((model, figures?));
        }
        for _ in 0..rounds {
            for (model, figures) in &mut benches {
                round(model, figures, &mut machine)?;
            }
        }
        for (model, figures) in &benches {
            print_figures(model, figures);
        }
        print_limits(&machine);
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
    match measure(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
