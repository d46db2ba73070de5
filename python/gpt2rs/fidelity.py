"""What a smaller type of weights, or of keys and values, costs in accuracy, on a text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import scoring
from .gpt2 import GPT2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .prompts import Prompt

REFERENCE = "float32"
VARIANTS = ("float32", "bfloat16", "bfloat16/fast", "int8", "int4")
_DTYPES = ("float32", "bfloat16", "int8", "int4")
_KV_DTYPES = ("float32", "bfloat16", "int8")
# Rows of logits that are turned into float64 at a time: 26 MB an array, with GPT-2's vocabulary.
_ROWS = 64


@dataclass(frozen=True)
class Fidelity:
    """How near one variant of a model comes to the same model in float32, over the positions of a text.

    The measures are those of llama.cpp's `llama-perplexity --kl-divergence`.  All are taken over the same
    positions, those before each of the text's tokens but the first, and all sums are in float64.  p and q are
    the distributions of the next token, softmax(logits), in float32 and of the variant.

    variant: what was compared, spelled as for `compare`.
    weight_bytes: bytes of the weights as held in memory, `GPT2.memory_footprint()`.
    n_positions: T - 1 for a text of T tokens.
    perplexity: exp of the mean of -ln q(the text's next token).
    perplexity_ratio: `perplexity` over that in float32.
    mean_kl, kl_99, max_kl: mean, 99 % quantile and maximum over the positions of the Kullback-Leibler
        divergence KL(p || q) = sum over the vocabulary of p ln(p / q), in nats; 0 where the two agree.
    same_top: share, 0 to 1, of the positions with the same most likely token, the lowest id among equals.
    """

    variant: str
    weight_bytes: int
    n_positions: int
    perplexity: float
    perplexity_ratio: float
    mean_kl: float
    kl_99: float
    max_kl: float
    same_top: float


def compare(
    name_or_path: str | os.PathLike[str],
    prompt: Prompt,
    variants: Iterable[str] = VARIANTS,
    *,
    stride: int | None = None,
    **options: Any,
) -> list[Fidelity]:
    """How near variants of a model come to it in float32, on a text: one `Fidelity` for each, in their order.

    name_or_path: a model, as `GPT2.from_pretrained` takes it.
    prompt: a text, or T token ids, at least 2; better text that the model was not trained on, and many
        thousand tokens of it.
    variants: each a dtype, with /fast for `precision="fast"` and /kv=DTYPE for `kv_dtype`: "bfloat16",
        "bfloat16/fast", "int8/kv=float32".
    stride: as for `GPT2.score`: a text longer than `n_ctx` is read in windows, and each position is compared
        in one of them.
    options: others of `from_pretrained`, such as `n_threads` or `config`; TypeError for what variants choose.

    The model in float32 and one variant are in memory at a time, and the logits of one window, 2 n_ctx V
    float32 (412 MB for GPT-2).  float32 is computed again for each variant: time in place of memory.

    ValueError for an unknown variant, for logits that are not finite, and as from `score`; other errors are
    those of `from_pretrained`.
    """
    return list(each(name_or_path, prompt, variants, stride=stride, **options))


def each(
    name_or_path: str | os.PathLike[str],
    prompt: Prompt,
    variants: Iterable[str],
    *,
    stride: int | None = None,
    **options: Any,
) -> Iterator[Fidelity]:
    """`compare`, one after the other as they are done."""
    if isinstance(variants, str):
        raise ValueError(f"variants is {variants!r}; it must be a list, such as [{variants!r}]")
    for name in ("dtype", "kv_dtype", "precision"):
        if name in options:
            raise TypeError(f"{name} is part of a variant's name; known variants are {_KNOWN}")
    chosen = [(variant, variant_options(variant)) for variant in variants]
    if not chosen:
        raise ValueError(f"variants is empty; known are {_KNOWN}")
    reference = GPT2.from_pretrained(name_or_path, **{**options, **variant_options(REFERENCE)})
    tokens = reference._encode(prompt)
    for variant, own in chosen:
        same = variant == REFERENCE
        model = reference if same else GPT2.from_pretrained(name_or_path, **{**options, **own})
        yield measure(reference, model, tokens, variant=variant, stride=stride)


_KNOWN = f"{', '.join(_DTYPES)}, with /fast, and with /kv= and one of {', '.join(_KV_DTYPES)}"


def variant_options(variant: str) -> dict[str, str]:
    """The options of `from_pretrained` that a variant stands for; ValueError for an unknown one."""
    dtype, *parts = variant.split("/")
    options = {"dtype": dtype}
    for part in parts:
        name, _, value = part.partition("=")
        if part == "fast":
            options["precision"] = "fast"
        elif name == "kv" and value in _KV_DTYPES:
            options["kv_dtype"] = value
        else:
            dtype = ""
    if dtype not in _DTYPES or len(options) != 1 + len(parts):
        raise ValueError(f"variant is {variant!r}; known are {_KNOWN}")
    return options


def measure(
    reference: GPT2, model: GPT2, tokens: Sequence[int], *, variant: str, stride: int | None = None
) -> Fidelity:
    """The `Fidelity` of a model to one of the same vocabulary, on T token ids; errors as of `compare`."""
    divergences, losses, reference_losses, same_top = [], [], [], 0
    for begin, first, end in scoring.checked_windows(len(tokens), reference.config.n_ctx, stride):
        both = reference.logits(tokens[begin:end]), model.logits(tokens[begin:end])
        for logits, name in zip(both, (REFERENCE, variant), strict=True):
            if not np.isfinite(logits).all():
                raise ValueError(f"{name}: logits of tokens {begin} to {end - 1} are not all finite")
        # Row i of a window's logits predicts its token i + 1.
        for start in range(first - 1, end - 1, _ROWS):
            stop = min(start + _ROWS, end - 1)
            p, q = (log_softmax(logits[start - begin : stop - begin]) for logits in both)
            divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
            following = np.arange(stop - start), tokens[start + 1 : stop + 1]
            losses.append(-q[following])
            reference_losses.append(-p[following])
            same_top += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    # Never negative but for the rounding of the sums.
    divergence = np.maximum(np.concatenate(divergences), 0)
    loss, reference_loss = np.concatenate(losses).mean(), np.concatenate(reference_losses).mean()
    return Fidelity(
        variant=variant,
        weight_bytes=model.memory_footprint(),
        n_positions=len(divergence),
        perplexity=_exp(loss),
        perplexity_ratio=_exp(loss - reference_loss),
        mean_kl=float(divergence.mean()),
        kl_99=float(np.quantile(divergence, 0.99)),
        max_kl=float(divergence.max()),
        same_top=same_top / len(divergence),
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(..., V) float64: the natural logarithms of the probabilities of (..., V) logits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf
