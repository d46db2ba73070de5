//! Token and position embeddings: `x = wte[token] + wpe[position]`.

use super::panels::{Format, NR, Panels};

/// Row `token` of the (V, C) embedding that is packed as the LM head's (C, V) matrix, plus `wpe`'s row of C values.
///
/// # Panics
/// When the token is not in the vocabulary.
pub fn embed<F: Format>(wte: Panels<'_, F>, token: usize, wpe: &[f32], out: &mut [f32]) {
    assert!(token < wte.n());
    let panel = wte.panel(token / NR);
    for (k, (out, position)) in out.iter_mut().zip(wpe).enumerate() {
        *out = F::value(panel, k, token % NR) + position;
    }
}
