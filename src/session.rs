//! Sequences: prompts are prefilled, then tokens are decoded one after the other.

use crate::error::{Error, Result};
use crate::kv_cache::KvCache;
use crate::model::{MAX_ROWS, Model, Run, Wanted};
use crate::sample::{Sample, Sampling, Scratch, log_softmax_at};
use crate::simd::in_default_mode;

/// Whether a computation may go on; asked before each layer.
pub type Proceed<'a> = &'a dyn Fn() -> bool;

/// Tokens, and the cache of those that have been computed; `clone` forks it.
///
/// The last tokens may be pending: taken in, and computed when something that follows from them is asked for.
#[derive(Clone)]
pub struct Sequence {
    tokens: Vec<u32>,
    cache: KvCache,
    /// (V,): logits of the last token, or empty when it is pending or they were not asked for.
    logits: Vec<f32>,
}

impl Sequence {
    /// An empty sequence.
    pub fn new(model: &Model) -> Sequence {
        Sequence { tokens: Vec::new(), cache: model.new_cache(), logits: Vec::new() }
    }

    /// The tokens taken in.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        if len < self.tokens.len() {
            self.tokens.truncate(len);
            self.cache.truncate(len);
            self.logits.clear();
        }
    }

    /// The logits of the last token, (V,).
    ///
    /// # Errors
    /// [`Error::EmptySequence`], and what [`Model::forward`] says.
    pub fn logits(&mut self, model: &Model, proceed: Proceed<'_>) -> Result<&[f32]> {
        if self.logits.is_empty() {
            let mut logits = vec![0.0; model.config().n_vocab];
            compute(model, &mut [(self, 1)], &mut logits, proceed)?;
            self.logits = logits;
        }
        Ok(&self.logits)
    }

    /// The logits of the last token, where they are there without computing.
    pub(crate) fn known_logits(&self) -> Option<&[f32]> {
        (!self.logits.is_empty()).then_some(&self.logits)
    }

    /// Whether nothing of it has been computed.
    pub(crate) fn is_fresh(&self) -> bool {
        self.cache.is_empty()
    }

    /// How many tokens it begins with in common with others.
    pub(crate) fn common(&self, tokens: &[u32]) -> usize {
        self.tokens.iter().zip(tokens).take_while(|(own, other)| own == other).count()
    }

    /// Becomes a sequence of these tokens; what it begins with in common stays computed.
    pub(crate) fn follow(&mut self, model: &Model, tokens: &[u32]) -> Result<()> {
        let common = self.common(tokens);
        self.truncate(common);
        self.push(model, &tokens[common..])
    }

    fn pending(&self) -> usize {
        self.tokens.len() - self.cache.len()
    }

    /// Takes tokens in as pending.
    pub(crate) fn push(&mut self, model: &Model, tokens: &[u32]) -> Result<()> {
        let n_vocab = model.config().n_vocab;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= n_vocab) {
            return Err(Error::TokenOutOfRange { token, n_vocab });
        }
        let (wanted, n_ctx) = (self.tokens.len() + tokens.len(), model.config().n_ctx);
        if wanted > n_ctx {
            return Err(Error::ContextOverflow { wanted, n_ctx });
        }
        self.tokens.extend_from_slice(tokens);
        self.logits.clear();
        Ok(())
    }
}

/// Appends a prompt to each sequence and computes all of them together. After an error the sequences are as before.
///
/// # Errors
/// [`Error::EmptySequence`] for a sequence that would stay empty, and what [`Model::forward`] says.
pub fn prefill(
    model: &Model,
    sequences: &mut [&mut Sequence],
    prompts: &[&[u32]],
    proceed: Proceed<'_>,
) -> Result<()> {
    assert_eq!(sequences.len(), prompts.len());
    let before: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
    let result = (|| {
        for (sequence, prompt) in sequences.iter_mut().zip(prompts) {
            sequence.push(model, prompt)?;
        }
        let n_vocab = model.config().n_vocab;
        let mut stale: Vec<(&mut Sequence, usize)> = sequences
            .iter_mut()
            .filter(|sequence| sequence.logits.is_empty())
            .map(|sequence| (&mut **sequence, 1))
            .collect();
        let mut logits = vec![0.0; stale.len() * n_vocab];
        compute(model, &mut stale, &mut logits, proceed)?;
        for ((sequence, _), logits) in stale.into_iter().zip(logits.chunks_exact(n_vocab)) {
            sequence.logits = logits.to_vec();
        }
        Ok(())
    })();
    if result.is_err() {
        for (sequence, before) in sequences.iter_mut().zip(before) {
            sequence.truncate(before);
        }
    }
    result
}

/// Chooses the next token of each sequence and takes it in as pending: what is pending before is computed first, all
/// sequences in one batch, and the last token of a text is never computed in vain.
///
/// # Errors
/// [`Error::EmptySequence`], [`Error::ContextOverflow`] when a token would not fit, and what sampling says.
pub fn decode(
    model: &Model,
    sequences: &mut [&mut Sequence],
    samplings: &[&Sampling],
    scratch: &mut DecodeScratch,
    proceed: Proceed<'_>,
) -> Result<Vec<Sample>> {
    assert_eq!(sequences.len(), samplings.len());
    let (n_vocab, n_ctx) = (model.config().n_vocab, model.config().n_ctx);
    if let Some(full) = sequences.iter().find(|sequence| sequence.tokens.len() >= n_ctx) {
        return Err(Error::ContextOverflow { wanted: full.tokens.len() + 1, n_ctx });
    }
    let DecodeScratch { logits, sample } = scratch;
    let mut stale: Vec<(&mut Sequence, usize)> = sequences
        .iter_mut()
        .filter(|sequence| sequence.logits.is_empty())
        .map(|sequence| (&mut **sequence, 1))
        .collect();
    logits.resize(stale.len() * n_vocab, 0.0);
    compute(model, &mut stale, logits, proceed)?;
    let mut computed = logits.chunks_exact(n_vocab);
    let mut samples = Vec::with_capacity(sequences.len());
    for (sequence, sampling) in sequences.iter().zip(samplings) {
        let row = if sequence.logits.is_empty() {
            computed.next().expect("a row for each sequence without logits")
        } else {
            &sequence.logits
        };
        samples.push(in_default_mode(|| sampling.choose(model.isa(), row, &sequence.tokens, sample))?);
    }
    for (sequence, sample) in sequences.iter_mut().zip(&samples) {
        sequence.push(model, &[sample.token])?;
    }
    Ok(samples)
}

/// Memory that decoding uses again for each token.
#[derive(Default)]
pub struct DecodeScratch {
    pub(crate) logits: Vec<f32>,
    pub(crate) sample: Scratch,
}

/// Computes all that is pending, and the logits of each sequence's last tokens, as many as are given with it (1 or more):
/// (rows, V), those of one sequence after the other.
pub(crate) fn compute(
    model: &Model,
    sequences: &mut [(&mut Sequence, usize)],
    logits: &mut [f32],
    proceed: Proceed<'_>,
) -> Result<()> {
    for (sequence, wanted) in sequences.iter_mut() {
        if sequence.tokens.is_empty() {
            return Err(Error::EmptySequence);
        }
        // Computed before, but its logits were not kept.
        sequence.cache.truncate(sequence.tokens.len() - *wanted);
    }
    let n_vocab = model.config().n_vocab;
    // Rows are in the order of the sequences, whatever the passes are, and so are their logits.
    let (mut done, mut rows_done) = (0, 0);
    while done < sequences.len() {
        let mut room = MAX_ROWS;
        let mut runs = Vec::new();
        let mut ending = 0;
        for (sequence, wanted) in &mut sequences[done..] {
            let pending = sequence.pending();
            let count = pending.min(room);
            if count == 0 {
                break;
            }
            room -= count;
            ending += usize::from(count == pending);
            let start = sequence.cache.len();
            let tokens = &sequence.tokens[start..start + count];
            // Of the last rows, those that are in this pass.
            let wanted = (*wanted + count).saturating_sub(pending).min(count);
            runs.push(Run { tokens, cache: &mut sequence.cache, wanted });
        }
        let rows: usize = runs.iter().map(|run| run.wanted).sum();
        let out = &mut logits[rows_done * n_vocab..(rows_done + rows) * n_vocab];
        model.forward(&mut runs, Wanted::Last(out), proceed)?;
        done += ending;
        rows_done += rows;
    }
    Ok(())
}

/// The logits of every token of a sequence, (T, V).
///
/// # Errors
/// What [`Model::forward`] says; [`Error::EmptySequence`].
pub fn logits(model: &Model, tokens: &[u32], proceed: Proceed<'_>) -> Result<Vec<f32>> {
    let n_vocab = model.config().n_vocab;
    let mut out = vec![0.0; sized(model, tokens, n_vocab)?];
    passes(model, tokens, MAX_ROWS, proceed, |pass, range| {
        pass(Wanted::All(&mut out[range.start * n_vocab..range.end * n_vocab]))
    })?;
    Ok(out)
}

/// The hidden states after `ln_f` of every token of a sequence, (T, C).
///
/// # Errors
/// What [`Model::forward`] says; [`Error::EmptySequence`].
pub fn hidden_states(model: &Model, tokens: &[u32], proceed: Proceed<'_>) -> Result<Vec<f32>> {
    let c = model.config().n_embd;
    let mut out = vec![0.0; sized(model, tokens, c)?];
    passes(model, tokens, MAX_ROWS, proceed, |pass, range| {
        pass(Wanted::Hidden(&mut out[range.start * c..range.end * c]))
    })?;
    Ok(out)
}

/// `ln p(token[i + 1] | token[..=i])` for each i, (T - 1,); logits are held for a few rows at a time.
///
/// # Errors
/// What [`Model::forward`] says; [`Error::EmptySequence`].
pub fn score(model: &Model, tokens: &[u32], proceed: Proceed<'_>) -> Result<Vec<f32>> {
    /// 64 rows of a 50257-token vocabulary are 13 MB.
    const ROWS: usize = 64;
    let n_vocab = model.config().n_vocab;
    sized(model, tokens, 1)?;
    let mut rows = vec![0.0; ROWS.min(tokens.len()) * n_vocab];
    let mut out = Vec::with_capacity(tokens.len() - 1);
    passes(model, tokens, ROWS, proceed, |pass, range| {
        let rows = &mut rows[..range.len() * n_vocab];
        pass(Wanted::All(rows))?;
        let targets = tokens[range.start + 1..].iter();
        out.extend(
            rows.chunks_exact(n_vocab)
                .zip(targets)
                .map(|(row, &token)| in_default_mode(|| log_softmax_at(model.isa(), row, token))),
        );
        Ok(())
    })?;
    Ok(out)
}

/// `tokens.len() * width`, once the tokens are known to fit.
fn sized(model: &Model, tokens: &[u32], width: usize) -> Result<usize> {
    let (wanted, n_ctx) = (tokens.len(), model.config().n_ctx);
    match wanted {
        0 => Err(Error::EmptySequence),
        _ if wanted > n_ctx => Err(Error::ContextOverflow { wanted, n_ctx }),
        _ => Ok(wanted * width),
    }
}

/// Runs a fresh sequence in passes of at most `rows` tokens; `each` gets the pass to run and its range of tokens.
fn passes(
    model: &Model,
    tokens: &[u32],
    rows: usize,
    proceed: Proceed<'_>,
    mut each: impl FnMut(&mut dyn FnMut(Wanted<'_>) -> Result<()>, std::ops::Range<usize>) -> Result<()>,
) -> Result<()> {
    let mut cache = model.new_cache();
    for (i, tokens) in tokens.chunks(rows).enumerate() {
        let range = i * rows..i * rows + tokens.len();
        let mut pass = |wanted: Wanted<'_>| {
            model.forward(&mut [Run { tokens, cache: &mut cache, wanted: 1 }], wanted, proceed)
        };
        each(&mut pass, range)?;
    }
    Ok(())
}
