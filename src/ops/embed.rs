//! Token and position embeddings: `x = wte[token] + wpe[position]`.

use super::panels::{Format, NR, Panels};

/// Row `token` of the (V, C) embedding that is packed as the LM head's (C, V) matrix, plus `wpe`'s row of C values.
///
/// # Panics
/// When the token is not in the vocabulary.
pub fn embed<F: Format>(wte: Panels<'_, F>, token: usize, wpe: &[f32], out: &mut [f32]) {
    /// Rows of the longest group.
    const LONGEST: usize = 64;
    let (panel, lane) = (token / NR, token % NR);
    assert!(token < wte.n());
    let mut rows = [[0.0; NR]; LONGEST];
    let rows = &mut rows[..F::GROUP];
    for (group, (out, position)) in out.chunks_mut(F::GROUP).zip(wpe.chunks(F::GROUP)).enumerate() {
        F::decode(wte.panel(panel), group, rows);
        for ((out, position), row) in out.iter_mut().zip(position).zip(&*rows) {
            *out = row[lane] + position;
        }
    }
}
