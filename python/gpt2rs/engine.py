"""What the Python API needs of whatever computes a model: the core on the CPU, or the CUDA path on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from ._core import Config, Sampler, Speculator


class Sample(Protocol):
    """A token that was chosen, and what the model itself thought of it."""

    @property
    def token(self) -> int:
        """Its id."""

    @property
    def logprob(self) -> float | None:
        """Its log-probability, before processors; None unless the sampler was asked for it."""

    @property
    def top_logprobs(self) -> Sequence[tuple[int, float]]:
        """The most likely tokens with theirs, in descending order."""


class Sequenced(Protocol):
    """One sequence and its keys and values; see `gpt2rs.Session`, which is a thin layer over it."""

    @property
    def pos(self) -> int:
        """Number of tokens."""

    @property
    def tokens(self) -> list[int]:
        """All of them."""

    @property
    def logits(self) -> NDArray[np.float32]:
        """(V,) float32, of the last token; ValueError for an empty sequence."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens; ValueError, with the sequence unchanged, for what does not fit."""

    def fork(self) -> Self:
        """A second sequence with the same tokens."""

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens."""


S = TypeVar("S", bound=Sequenced)


class Engine(Protocol[S]):
    """A model that is loaded and ready to compute.

    Shapes: T tokens, C = n_embd, V = n_vocab.  The lists of `prefill`, `decode` and `decode_several` go
    together, one entry a sequence, and what a sequence gets does not depend on the others.
    """

    @property
    def config(self) -> Config:
        """The model's shape."""

    @property
    def dtype(self) -> str:
        """How weights are held."""

    @property
    def kv_dtype(self) -> str:
        """How keys and values are held."""

    @property
    def precision(self) -> str:
        """`exact` or `fast`."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda:N`."""

    @property
    def max_batch(self) -> int:
        """Sequences that are worth decoding together."""

    @property
    def n_threads(self) -> int:
        """Threads of the CPU that a call computes with."""

    @property
    def isa(self) -> str:
        """The instruction set, or the GPU's architecture."""

    def memory_footprint(self) -> int:
        """Bytes of the weights as held."""

    def save_safetensors(self, path: str) -> None:
        """Write the weights, in the type that they are held in, under the checkpoint's names."""

    def save_packed(self, path: str) -> None:
        """Write the weights as the CPU's kernels take them."""

    def session(self) -> S:
        """An empty sequence."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(T, V) float32."""

    def hidden_states(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(T, C) float32, after `ln_f`."""

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(T - 1,) float32: the log-probability of each token but the first."""

    def prefill(self, sessions: Sequence[S], prompts: Sequence[Sequence[int]]) -> None:
        """Append to each sequence its prompt."""

    def decode(self, sessions: Sequence[S], samplers: Sequence[Sampler]) -> Sequence[Sample]:
        """Choose the next token of each sequence, and append it."""

    def decode_several(
        self,
        sessions: Sequence[S],
        samplers: Sequence[Sampler],
        speculators: Sequence[Speculator],
        rooms: Sequence[int],
    ) -> Sequence[tuple[Sequence[Sample], int, int]]:
        """The same, of each sequence one token or more, up to its room, with how many were proposed and
        accepted."""
