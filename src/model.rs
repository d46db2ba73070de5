//! GPT-2: embed -> blocks (ln_1, attention, ln_2, mlp) -> ln_f -> logits.
//!
//! Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; equal to `GPT2LMHeadModel` of Hugging
//! Face transformers.

use crate::config::{Config, Precision};
use crate::error::{Error, Result};
use crate::kv_cache::{KvCache, Supply};
use crate::parallel::{Activations, AttentionRun, Workers};
use crate::pool::{PerProcess, Pool, default_threads};
use crate::simd::{Isa, in_default_mode};
use crate::weights::{Block, Dtype, Origin, Weights, packed_bytes};
use std::sync::Arc;

/// Rows of one pass at most: more would leave the second-level cache, and a caller who wants to stop waits for a layer.
pub const MAX_ROWS: usize = 512;

/// Weights, and the threads that compute with them.
pub struct Model {
    config: Config,
    weights: Weights,
    dtype: Dtype,
    kv_dtype: Dtype,
    precision: Precision,
    isa: Isa,
    n_threads: usize,
    supply: Arc<Supply>,
    engine: PerProcess<Engine>,
}

/// How a model is held and run; the default is float32, on all cores that help.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Type of the matrices.
    pub dtype: Dtype,
    /// Type of the caches; `None` follows the weights.
    pub kv_dtype: Option<Dtype>,
    /// How exactly activations enter products.
    pub precision: Precision,
    /// Threads; `None` chooses.
    pub n_threads: Option<usize>,
    /// Instruction set; `None` takes `GPT2RS_ISA` or the fastest.
    pub isa: Option<Isa>,
}

impl Default for Options {
    fn default() -> Options {
        Options { dtype: Dtype::F32, kv_dtype: None, precision: Precision::Exact, n_threads: None, isa: None }
    }
}

/// New tokens of one sequence, to be appended to its cache.
pub struct Run<'a> {
    /// The tokens; one to decode, many to prefill.
    pub tokens: &'a [u32],
    /// The sequence's cache, grown by as many positions.
    pub cache: &'a mut KvCache,
    /// How many of its last rows are wanted, by [`Wanted::Last`].
    pub wanted: usize,
}

/// What a pass gives.
pub enum Wanted<'a> {
    /// (wanted rows, V): logits of the last tokens of each run.
    Last(&'a mut [f32]),
    /// (rows, V): logits of all tokens of all runs.
    All(&'a mut [f32]),
    /// (rows, C): hidden states after `ln_f` of all tokens of all runs.
    Hidden(&'a mut [f32]),
}

/// What a pass needs beside weights and caches.
struct Engine {
    workers: Workers,
    x: Activations,
    qkv: Activations,
    attended: Activations,
    hidden: Activations,
    sums: Activations,
    last: Activations,
}

impl Model {
    /// Packs the weights and starts the threads.
    ///
    /// # Errors
    /// What [`Weights::new`] says; an instruction set that is not there; threads that the system refuses.
    pub fn new(config: Config, origin: Origin<'_>, options: Options) -> Result<Model> {
        let isa = options.isa.map_or_else(Isa::from_env, Ok)?;
        let bytes = packed_bytes(&config, options.dtype) as usize;
        let n_threads = options.n_threads.unwrap_or_else(|| default_threads(bytes));
        let dtype = options.dtype;
        let packing_threads = options.n_threads.unwrap_or_else(|| default_threads(usize::MAX));
        // Values are rounded here too, by threads that inherit this one's floating-point mode.
        let weights = in_default_mode(|| Weights::new(&config, origin, dtype, packing_threads))?;
        let pool = Pool::new(n_threads).map_err(|source| Error::Threads { n_threads, source })?;
        let kv_dtype = options.kv_dtype.unwrap_or(dtype.cache());
        let engine = move |pool| Engine::new(Workers::new(isa, options.precision, kv_dtype, pool));
        let engine = PerProcess::new(engine(pool), move || {
            // A child that gets no threads computes alone, to the same bits.
            let pool =
                Pool::new(n_threads).or_else(|_| Pool::new(1)).expect("a pool of one starts no thread");
            engine(pool)
        });
        let supply = Arc::new(Supply::new(&config, kv_dtype));
        let precision = options.precision;
        Ok(Model { config, weights, dtype, kv_dtype, precision, isa, n_threads, supply, engine })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The matrices' type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The caches' type.
    pub fn kv_dtype(&self) -> Dtype {
        self.kv_dtype
    }

    /// How exactly activations enter products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The instruction set that computes.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// An empty cache for a sequence of this model.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(&self.supply)
    }

    /// Computes new tokens of any number of sequences in one pass, at most [`MAX_ROWS`] in all.
    ///
    /// `proceed` is asked before each layer; when it says no, the caches stay as they were.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], [`Error::ContextOverflow`], [`Error::Cancelled`].
    ///
    /// # Panics
    /// When there are too many rows, no tokens in a run, more rows wanted than it has, or the output has another size.
    pub fn forward(
        &self,
        runs: &mut [Run<'_>],
        wanted: Wanted<'_>,
        proceed: &dyn Fn() -> bool,
    ) -> Result<()> {
        let tokens = self.place(runs)?;
        assert!(tokens.len() <= MAX_ROWS, "{} rows in one pass", tokens.len());
        in_default_mode(|| self.pass(runs, &tokens, wanted, proceed))
    }

    fn pass(
        &self,
        runs: &mut [Run<'_>],
        tokens: &[(u32, usize)],
        wanted: Wanted<'_>,
        proceed: &dyn Fn() -> bool,
    ) -> Result<()> {
        let Weights { wte, wpe, h, ln_f, lm_head } = &self.weights;
        let Engine { workers, x, qkv, attended, hidden, sums, last } = &mut *self.engine.lock();
        let eps = self.config.layer_norm_epsilon;
        for run in &mut *runs {
            run.cache.reserve(run.tokens.len());
        }

        workers.embed(wte, wpe, tokens, x.shape(tokens.len(), self.config.n_embd));
        for (layer, Block { ln_1, attn, ln_2, mlp }) in h.iter().enumerate() {
            if !proceed() {
                return Err(Error::Cancelled);
            }
            workers.norm_linear(x, (ln_1, eps), &attn.c_attn, None, qkv);
            let caches = runs.iter_mut().map(|run| AttentionRun {
                position: run.cache.len(),
                rows: run.tokens.len(),
                heads: run.cache.heads(layer),
            });
            workers.attention(qkv, caches.collect(), self.config.attn_scale(layer), attended);
            workers.add_linear(attended, &attn.c_proj, sums, x);
            workers.norm_linear(x, (ln_2, eps), &mlp.c_fc, Some(self.config.activation_function), hidden);
            workers.add_linear(hidden, &mlp.c_proj, sums, x);
        }
        for run in &mut *runs {
            run.cache.advance(run.tokens.len());
        }

        let head = lm_head.as_ref().unwrap_or(wte);
        match wanted {
            Wanted::Hidden(out) => workers.norm(x, (ln_f, eps), out),
            Wanted::All(out) => workers.norm_head(x, (ln_f, eps), head, out),
            Wanted::Last(out) => {
                let ends = runs.iter().scan(0, |end, run| {
                    *end += run.tokens.len();
                    Some((run.wanted, *end))
                });
                let rows: Vec<usize> = ends.flat_map(|(wanted, end)| end - wanted..end).collect();
                last.shape(rows.len(), self.config.n_embd);
                for (i, row) in rows.into_iter().enumerate() {
                    last.row_mut(i).copy_from_slice(x.row(row));
                }
                workers.norm_head(last, (ln_f, eps), head, out);
            }
        }
        Ok(())
    }

    /// Every new token with its position, all of them checked.
    fn place(&self, runs: &[Run<'_>]) -> Result<Vec<(u32, usize)>> {
        let Config { n_vocab, n_ctx, .. } = self.config;
        let mut tokens = Vec::new();
        for run in runs {
            assert!(!run.tokens.is_empty(), "a run without tokens");
            assert!(run.wanted <= run.tokens.len(), "more rows wanted than the run has");
            let position = run.cache.len();
            let wanted = position + run.tokens.len();
            if wanted > n_ctx {
                return Err(Error::ContextOverflow { wanted, n_ctx });
            }
            if let Some(&token) = run.tokens.iter().find(|&&token| token as usize >= n_vocab) {
                return Err(Error::TokenOutOfRange { token, n_vocab });
            }
            tokens.extend(run.tokens.iter().copied().zip(position..));
        }
        Ok(tokens)
    }
}

impl Engine {
    fn new(workers: Workers) -> Engine {
        Engine {
            workers,
            x: Activations::default(),
            qkv: Activations::default(),
            attended: Activations::default(),
            hidden: Activations::default(),
            sums: Activations::default(),
            last: Activations::default(),
        }
    }
}
