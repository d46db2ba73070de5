"""What training costs in arithmetic."""

from __future__ import annotations

from .. import _core


def flops_per_token(config: _core.Config, n_tokens: int) -> int:
    """Floating-point operations of forward and backward pass for one token of a sequence of `n_tokens`.

    2 for each multiply-add of the forward pass: the blocks' matrices, the head, and causal attention (q k
    and p v over the positions up to each, half of n_tokens on average); and twice these for the backward
    pass.  That is 6 N + 6 n_layer n_embd (n_tokens + 1), N being the weights that enter products.  What is
    computed a second time, in attention or by `recompute`, is not counted.  Kaplan et al. 2020,
    arXiv:2001.08361, and Chowdhery et al. 2022, arXiv:2204.02311, appendix B, count alike but for the
    causal half.
    """
    c = config.n_embd
    matrices = config.n_layer * (4 * c * c + 2 * c * config.n_inner) + config.n_vocab * c
    return 6 * matrices + 6 * config.n_layer * c * (n_tokens + 1)
