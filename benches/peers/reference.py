"""GPT-2 in plain NumPy: the referee of the tokens, slow and obvious."""

import numpy as np
from checkpoint import Weights


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    variance = x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def last_logits(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """The logits (B, V) after the last of the tokens (B, T)."""
    shape = weights.shape
    b, t = tokens.shape
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:t]  # (B, T, C)
    hidden = np.triu(np.full((t, t), -np.inf, np.float32), 1)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[name + ".weight"] + weights[name + ".bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return layer_norm(x, weights[name + ".weight"], weights[name + ".bias"])

    for i in range(shape.n_layer):
        block = f"h.{i}."
        qkv = linear(norm(x, block + "ln_1"), block + "attn.c_attn")
        qkv = qkv.reshape(b, t, 3, shape.n_head, shape.head_size)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, NH, T, HS) each
        scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(shape.head_size)) + hidden
        mixed = (softmax(scores) @ v).swapaxes(1, 2).reshape(b, t, shape.n_embd)
        x = x + linear(mixed, block + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, block + "ln_2"), block + "mlp.c_fc")), block + "mlp.c_proj")
    return norm(x[:, -1], "ln_f") @ weights["wte.weight"].T


def greedy(weights: Weights, prompts: list[list[int]], n: int) -> tuple[list[list[int]], list[list[float]]]:
    """The next `n` greedy tokens of each prompt, and of each token by how much its logit leads the second.

    Prompts are of one length.
    """
    tokens = np.array(prompts)
    margins: list[np.ndarray] = []
    for _ in range(n):
        logits = last_logits(weights, tokens)
        second, best = np.sort(np.partition(logits, -2)[:, -2:])[:, 0], logits.max(-1)
        margins.append(best - second)
        tokens = np.concatenate([tokens, logits.argmax(-1)[:, None]], 1)
    return tokens[:, len(prompts[0]) :].tolist(), np.stack(margins, 1).tolist()
