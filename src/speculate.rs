//! Several tokens a pass: what may follow is proposed, computed in one pass, and kept as far as it is what plain decoding
//! gives.
//!
//! ```text
//! sequence -> n-gram lookup, or a draft model -> k proposed tokens
//! pending + proposed -> one pass -> k + 1 rows of logits -> the model's own token of each row -> accept while equal
//! ```
//!
//! Decoding is bound by memory: a pass over a few rows reads the weights once, as a pass over one does. The model's own
//! token is a function of (settings, logits, tokens before, seed, index, position), and logits are the same bits for one
//! row or several, so the tokens are those of plain decoding, greedy or drawn. That is more than the rejection rule of
//! speculative sampling promises, which keeps the distribution (Leviathan, Kalman and Matias, "Fast Inference from
//! Transformers via Speculative Decoding", ICML 2023; Chen et al., "Accelerating Large Language Model Decoding with
//! Speculative Sampling", 2023). Nothing is lost against it where the proposal is one certain token, as a lookup's or a
//! greedy draft's is: a draw equals a token with its probability p, and p is what the rejection rule accepts it with. A
//! draft model that draws does so by the same settings and random bits, so that both fall on the same token where their
//! distributions are alike.
//!
//! Lookups are those of Saxena's "Prompt Lookup Decoding" (2023), `prompt_lookup_num_tokens` of Hugging Face
//! transformers; draft models its `assistant_model`.

use crate::error::{Error, Result};
use crate::model::Model;
use crate::sample::{Sample, Sampling};
use crate::session::{self, DecodeScratch, Proceed, Sequence};
use crate::simd::in_default_mode;
use std::borrow::Cow;

mod lookup;
mod policy;

use lookup::Guess;
use policy::{Costs, DraftPolicy, LookupPolicy};

/// Rows of one pass at most: beyond, arithmetic binds rather than memory, and their logits take memory of their own.
const MAX_ROWS: usize = 128;

/// Where one text's proposals come from, and how well they did.
pub struct Speculator {
    /// Proposed tokens of a pass at most.
    num_tokens: usize,
    source: Source,
}

enum Source {
    Lookup { max_ngram: usize, policy: LookupPolicy },
    Draft { sequence: Sequence, policy: DraftPolicy },
}

/// One text in a batch.
pub struct Text<'a> {
    /// Its tokens.
    pub sequence: &'a mut Sequence,
    /// How its tokens are chosen.
    pub sampling: &'a Sampling,
    /// Where its proposals come from.
    pub speculator: &'a mut Speculator,
    /// New tokens that it takes at most; 1 or more.
    pub room: usize,
}

/// What a pass gave one text.
#[derive(Debug, Default)]
pub struct Step {
    /// Its new tokens, one or more; an eos is the last.
    pub samples: Vec<Sample>,
    /// How many tokens were proposed.
    pub proposed: usize,
    /// How many of `samples`, from the first on, were proposed.
    pub accepted: usize,
}

impl Speculator {
    /// Proposes up to `num_tokens` tokens that followed, in the text itself, on its last `max_ngram` tokens or fewer.
    pub fn lookup(num_tokens: usize, max_ngram: usize) -> Speculator {
        Speculator { num_tokens, source: Source::Lookup { max_ngram, policy: LookupPolicy::default() } }
    }

    /// Proposes, to `model`, up to `num_tokens` tokens that `draft` chooses.
    ///
    /// # Errors
    /// [`Error::Setting`] when the vocabularies differ.
    pub fn draft(model: &Model, draft: &Model, num_tokens: usize) -> Result<Speculator> {
        let (n_vocab, found) = (model.config().n_vocab, draft.config().n_vocab);
        if found != n_vocab {
            return Err(Error::Setting {
                setting: "assistant_model",
                value: format!("a model with a vocabulary of {found} tokens"),
                expected: format!(
                    "one with the vocabulary of the model that it drafts for, {n_vocab} tokens"
                ),
            });
        }
        let source = Source::Draft { sequence: Sequence::new(draft), policy: DraftPolicy::default() };
        Ok(Speculator { num_tokens, source })
    }
}

impl Speculator {
    /// Takes in what became of a proposal.
    fn observe(&mut self, proposal: &Proposal, step: &Step) {
        match &mut self.source {
            Source::Lookup { policy, .. } => {
                if let Some(guess) = &proposal.guess {
                    policy.observe(guess, step.samples.iter().map(|sample| sample.token));
                }
            }
            Source::Draft { policy, .. } => policy.observe(step.proposed, step.accepted),
        }
    }
}

/// What is proposed for one text in a pass.
#[derive(Default)]
struct Proposal {
    /// The tokens that are computed.
    tokens: Vec<u32>,
    /// All that a lookup gave, of which `tokens` is the beginning; the rest is only compared with what comes.
    guess: Option<Guess>,
}

/// Chooses the next tokens of each text, one or more, and takes them in; those of all texts are computed in one batch,
/// after what was pending. They are the tokens that [`session::decode`] gives one by one. `draft` is the model of those
/// texts' speculators that have one. After an error the texts are as before.
///
/// # Errors
/// As [`session::decode`].
///
/// # Panics
/// When a speculator has a draft model and `draft` is none, or another.
pub fn decode(
    model: &Model,
    draft: Option<&Model>,
    texts: &mut [Text<'_>],
    scratch: &mut DecodeScratch,
    proceed: Proceed<'_>,
) -> Result<Vec<Step>> {
    let (n_vocab, n_ctx) = (model.config().n_vocab, model.config().n_ctx);
    if let Some(full) = texts.iter().find(|text| text.sequence.tokens().len() >= n_ctx) {
        return Err(Error::ContextOverflow { wanted: full.sequence.tokens().len() + 1, n_ctx });
    }
    let proposals = propose(model, draft, texts, scratch, proceed)?;
    let before: Vec<usize> = texts.iter().map(|text| text.sequence.tokens().len()).collect();
    let result = (|| {
        let mut stale = Vec::with_capacity(texts.len());
        for (text, proposal) in texts.iter_mut().zip(&proposals) {
            if text.sequence.known_logits().is_none() {
                text.sequence.push(model, &proposal.tokens)?;
                stale.push((&mut *text.sequence, proposal.tokens.len() + 1));
            }
        }
        let rows: usize = stale.iter().map(|(_, rows)| rows).sum();
        scratch.logits.resize(rows * n_vocab, 0.0);
        session::compute(model, &mut stale, &mut scratch.logits, proceed)?;
        verify(model, texts, &proposals, &before, scratch)
    })();
    let accepted = result.iter().flatten().map(|step| step.accepted).chain(std::iter::repeat(0));
    for ((text, before), accepted) in texts.iter_mut().zip(before).zip(accepted) {
        text.sequence.truncate(before + accepted);
    }
    let steps = result?;
    for ((text, proposal), step) in texts.iter_mut().zip(&proposals).zip(&steps) {
        if let Some(own) = step.samples.get(step.accepted) {
            text.sequence.push(model, &[own.token])?;
        }
        text.speculator.observe(proposal, step);
    }
    Ok(steps)
}

/// What to compute for each text beyond what is pending.
fn propose(
    model: &Model,
    draft: Option<&Model>,
    texts: &mut [Text<'_>],
    scratch: &mut DecodeScratch,
    proceed: Proceed<'_>,
) -> Result<Vec<Proposal>> {
    let rows = MAX_ROWS / texts.len().max(1);
    let costs = Costs::of(model, draft, texts.len());
    let mut proposals = Vec::with_capacity(texts.len());
    let mut drafting = Vec::new();
    for (i, text) in texts.iter_mut().enumerate() {
        let tokens = text.sequence.tokens();
        // The pass gives one token more than are proposed, and that has to fit as well. Where the logits are there
        // already, there is no pass.
        let room = text.room.min(model.config().n_ctx - tokens.len()).min(rows);
        let computes = text.sequence.known_logits().is_none();
        let most = if computes { room.saturating_sub(1).min(text.speculator.num_tokens) } else { 0 };
        let mut proposal = Proposal::default();
        match &mut text.speculator.source {
            Source::Lookup { max_ngram, policy } => {
                if let Some(mut guess) = lookup::guess(tokens, *max_ngram, most + 1) {
                    cut_after(&mut guess.tokens, &text.sampling.eos_token_ids);
                    let length = policy.length(&guess, most, costs);
                    proposal.tokens.extend_from_slice(&guess.tokens[..length]);
                    proposal.guess = Some(guess);
                }
            }
            Source::Draft { sequence, policy } => {
                let draft = draft.expect("the model of a speculator that drafts");
                let most = most.min(draft.config().n_ctx.saturating_sub(tokens.len()));
                let length = if most > 0 { policy.length(most, costs) } else { 0 };
                if length > 0 {
                    sequence.follow(draft, tokens)?;
                    drafting.push(Drafting { text: i, length, sequence, sampling: quiet(text.sampling) });
                }
            }
        }
        proposals.push(proposal);
    }
    if let Some(draft) = draft {
        write(draft, drafting, &mut proposals, scratch, proceed)?;
    }
    Ok(proposals)
}

/// A text that a draft model writes on.
struct Drafting<'a> {
    /// Its place in the batch.
    text: usize,
    /// How many tokens are still to come.
    length: usize,
    sequence: &'a mut Sequence,
    sampling: Cow<'a, Sampling>,
}

/// The same choice without log-probabilities, which none would see.
fn quiet(sampling: &Sampling) -> Cow<'_, Sampling> {
    if sampling.logprobs || sampling.top_logprobs > 0 {
        Cow::Owned(Sampling { logprobs: false, top_logprobs: 0, ..sampling.clone() })
    } else {
        Cow::Borrowed(sampling)
    }
}

/// Proposes what the draft model chooses by the texts' own settings and random bits, a token of all of them a pass.
fn write(
    draft: &Model,
    mut drafting: Vec<Drafting<'_>>,
    proposals: &mut [Proposal],
    scratch: &mut DecodeScratch,
    proceed: Proceed<'_>,
) -> Result<()> {
    share_beginnings(draft, &mut drafting, proceed)?;
    while !drafting.is_empty() {
        let (mut sequences, samplings): (Vec<&mut Sequence>, Vec<&Sampling>) =
            drafting.iter_mut().map(|text| (&mut *text.sequence, &*text.sampling)).unzip();
        let samples = match session::decode(draft, &mut sequences, &samplings, scratch, proceed) {
            // Whether a token can follow is for the texts' own model to say.
            Err(Error::NoCandidate { .. }) => break,
            samples => samples?,
        };
        for (text, sample) in drafting.iter_mut().zip(samples) {
            proposals[text.text].tokens.push(sample.token);
            text.length =
                if text.sampling.eos_token_ids.contains(&sample.token) { 0 } else { text.length - 1 };
        }
        drafting.retain(|text| text.length > 0);
    }
    Ok(())
}

/// Texts that begin alike, as those for one prompt do, let the draft model read that once.
fn share_beginnings(draft: &Model, drafting: &mut [Drafting<'_>], proceed: Proceed<'_>) -> Result<()> {
    /// A shorter beginning is read together with the rest.
    const SHORTEST: usize = 16;
    for i in 1..drafting.len() {
        let (before, after) = drafting.split_at_mut(i);
        let Drafting { sequence, .. } = &mut after[0];
        if !sequence.is_fresh() {
            continue;
        }
        let alike = before.iter_mut().map(|other| (other.sequence.common(sequence.tokens()), other));
        if let Some((common, other)) = alike.max_by_key(|(common, _)| *common)
            && common >= SHORTEST
        {
            other.sequence.logits(draft, proceed)?;
            let mut fork = other.sequence.clone();
            fork.follow(draft, sequence.tokens())?;
            **sequence = fork;
        }
    }
    Ok(())
}

/// Nothing follows on an eos.
fn cut_after(tokens: &mut Vec<u32>, eos_token_ids: &[u32]) {
    if let Some(at) = tokens.iter().position(|token| eos_token_ids.contains(token)) {
        tokens.truncate(at + 1);
    }
}

/// The model's own token of each row, as far as those before it are what was proposed. `before` are the texts' lengths
/// without proposals.
fn verify(
    model: &Model,
    texts: &[Text<'_>],
    proposals: &[Proposal],
    before: &[usize],
    scratch: &mut DecodeScratch,
) -> Result<Vec<Step>> {
    let n_vocab = model.config().n_vocab;
    let DecodeScratch { logits, sample } = scratch;
    let mut computed = &logits[..];
    let mut steps = Vec::with_capacity(texts.len());
    for ((text, proposal), &before) in texts.iter().zip(proposals).zip(before) {
        let Text { sequence, sampling, .. } = text;
        let rows = sequence.known_logits().unwrap_or_else(|| {
            let (rows, after) = computed.split_at((proposal.tokens.len() + 1) * n_vocab);
            computed = after;
            rows
        });
        let mut step = Step { proposed: proposal.tokens.len(), ..Step::default() };
        for (i, row) in rows.chunks_exact(n_vocab).enumerate() {
            let tokens = &sequence.tokens()[..before + i];
            let chosen = match in_default_mode(|| sampling.choose(model.isa(), row, tokens, sample)) {
                // In plain decoding the tokens before this one are given first.
                Err(_) if i > 0 => break,
                chosen => chosen?,
            };
            let token = chosen.token;
            step.samples.push(chosen);
            if proposal.tokens.get(i) != Some(&token) {
                break;
            }
            step.accepted += 1;
            if sampling.eos_token_ids.contains(&token) {
                break;
            }
        }
        steps.push(step);
    }
    Ok(steps)
}
