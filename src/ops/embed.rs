//! Token and position embeddings: `x = wte[token] + wpe[position]`.

use super::Rows;
use super::panels::{Format, NR, Panels};
use crate::pool::Columns;

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

/// `dwte[token] += dx` and `dwpe[position] += dx` for some columns of all rows, in ascending order of rows.
pub fn embed_backward(dx: Rows<'_>, tokens: &[(u32, usize)], dwte: &mut Columns<'_>, dwpe: &mut Columns<'_>) {
    for (row, &(token, position)) in tokens.iter().enumerate() {
        let dx = dx.row(row);
        for (sum, dx) in dwte.row(token as usize).iter_mut().zip(dx) {
            *sum += dx;
        }
        for (sum, dx) in dwpe.row(position).iter_mut().zip(dx) {
            *sum += dx;
        }
    }
}
