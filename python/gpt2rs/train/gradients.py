"""The loss of a batch and its gradients, for whoever studies a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _core
from .ids import inputs_and_targets

if TYPE_CHECKING:
    import numpy as np
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
    x, y = inputs_and_targets(inputs, targets)
    batch_size, n_tokens = x.shape
    if n_tokens > model.config.n_ctx:
        n_ctx = model.config.n_ctx
        raise ValueError(f"inputs have {n_tokens} tokens a sequence; the model has {n_ctx} positions (n_ctx)")
    if not isinstance(model._core, _core.Model):
        raise ValueError(f"the model is on {model.device}; gradients are computed on the CPU")
    trainer = _core.Trainer.of_model(model._core, batch_size=batch_size, n_tokens=n_tokens)
    loss = trainer.accumulate(x, y, step=0, micro_step=0, scale=1.0)
    return loss, {name: trainer.tensor("grad", name) for name in trainer.names()}
