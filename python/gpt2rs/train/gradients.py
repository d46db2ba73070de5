"""The loss of a batch and its gradients, for whoever studies a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ..gpt2 import GPT2


def loss_and_grads(
    model: GPT2, inputs: ArrayLike, targets: ArrayLike
) -> tuple[float, dict[str, NDArray[np.float32]]]:
    """Return the mean cross-entropy of `targets`, and its gradients by every weight.

    inputs: (B, T) integer token ids, T at most n_ctx.  targets: (B, T), what should follow each; for a text x
    of T + 1 tokens these are x[:-1] and x[1:].

    The loss is in nats a token.  Gradients are float32 under the checkpoint's names ("wte.weight",
    "h.0.attn.c_attn.weight", ...), in its shapes; a head that is tied to `wte` has its part in that of `wte`,
    and biases that the checkpoint left out, zeros, have gradients too.  All is computed in float32, without
    dropout; a bfloat16 model's weights are widened, which is exact.  The same bits whatever the number of
    threads and the instruction set.  Takes three float32 copies of the weights, and the activations.

    Raises ValueError for ids out of the vocabulary, shapes that do not fit, models held in int8 or int4,
    whose weights have no gradients, and models on a GPU.
    """
    ids = _ids("inputs", inputs)
    wanted = _ids("targets", targets)
    if ids.shape != wanted.shape:
        raise ValueError(f"inputs have shape {ids.shape} and targets {wanted.shape}; both must be (B, T)")
    batch_size, n_tokens = ids.shape
    if not ids.size:
        raise ValueError(f"inputs have shape {ids.shape}; there must be at least one token")
    if n_tokens > model.config.n_ctx:
        n_ctx = model.config.n_ctx
        raise ValueError(f"inputs have {n_tokens} tokens a sequence; the model has {n_ctx} positions (n_ctx)")
    if not isinstance(model._core, _core.Model):
        raise ValueError(f"the model is on {model.device}; gradients are computed on the CPU")
    trainer = _core.Trainer.of_model(model._core, batch_size=batch_size, n_tokens=n_tokens)
    loss = trainer.accumulate(ids, wanted, step=0, micro_step=0, scale=1.0)
    return loss, {name: trainer.tensor("grad", name) for name in trainer.names()}


def _ids(name: str, values: ArrayLike) -> NDArray[np.uint32]:
    array: NDArray[Any] = np.asarray(values)
    if array.ndim != 2 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be (B, T) integers, found shape {array.shape} of {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.uint32).max):
        raise ValueError(f"{name} must be token ids, found values from {array.min()} to {array.max()}")
    return array.astype(np.uint32)
