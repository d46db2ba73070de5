"""The compiled core: models, sequences and samplers.  Every call that computes releases the GIL."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Checkpoint",
    "Config",
    "Model",
    "Sample",
    "Sampler",
    "Session",
    "Speculator",
    "Trainer",
    "__version__",
    "probe_bandwidth",
    "probe_dot_bf16",
    "probe_dot_int8",
    "probe_fma",
]
__version__: str

@final
class Config:
    """The shape of a GPT-2, with the checkpoint's names.  Immutable."""

    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_inner(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def layer_norm_epsilon(self) -> float: ...
    @property
    def activation_function(self) -> str: ...
    @property
    def scale_attn_weights(self) -> bool: ...
    @property
    def scale_attn_by_inverse_layer_idx(self) -> bool: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def dtype(self) -> str | None: ...
    @staticmethod
    def from_json(text: str) -> Config: ...
    @staticmethod
    def preset(name: str) -> Config: ...
    def to_json(self) -> str: ...
    def num_parameters(self, *, lm_head: bool = False) -> int: ...
    def memory_footprint(self, dtype: str) -> int: ...

@final
class Checkpoint:
    """Tensor names -> where each tensor's bytes are; nothing of the data is read before `Model.load`."""

    def __init__(self) -> None: ...
    @staticmethod
    def open_safetensors(paths: Sequence[str]) -> Checkpoint: ...
    def add_file(
        self, name: str, path: str, offset: int, dtype: str, shape: Sequence[int], *, transposed: bool = False
    ) -> None: ...
    def add_array(self, name: str, array: NDArray[np.floating[Any]], *, transposed: bool = False) -> None: ...
    def packed(self) -> tuple[Config, str, str] | None: ...
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> list[int]: ...

@final
class Model:
    """Weights packed for the kernels, and the threads that run them."""

    @staticmethod
    def load(
        config: Config,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        kv_dtype: str | None = None,
        precision: str = "exact",
        n_threads: int | None = None,
    ) -> Model: ...
    @staticmethod
    def random(
        config: Config,
        *,
        seed: int,
        dtype: str,
        kv_dtype: str | None = None,
        precision: str = "exact",
        n_threads: int | None = None,
    ) -> Model: ...
    @property
    def config(self) -> Config: ...
    @property
    def dtype(self) -> str: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def memory_footprint(self) -> int: ...
    def save_safetensors(self, path: str) -> None: ...
    def save_packed(self, path: str) -> None: ...
    def session(self) -> Session: ...
    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]: ...
    def hidden_states(self, tokens: Sequence[int]) -> NDArray[np.float32]: ...
    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]: ...
    def prefill(self, sessions: Sequence[Session], prompts: Sequence[Sequence[int]]) -> None: ...
    def decode(self, sessions: Sequence[Session], samplers: Sequence[Sampler]) -> list[Sample]: ...
    def decode_several(
        self,
        sessions: Sequence[Session],
        samplers: Sequence[Sampler],
        speculators: Sequence[Speculator],
        rooms: Sequence[int],
    ) -> list[tuple[list[Sample], int, int]]: ...

@final
class Session:
    """One sequence and its keys and values."""

    @property
    def pos(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def logits(self) -> NDArray[np.float32]: ...
    def prefill(self, tokens: Sequence[int]) -> None: ...
    def fork(self) -> Session: ...
    def truncate(self, n: int) -> None: ...

@final
class Trainer:
    """Weights, gradients and AdamW's moments, float32, and the memory plan of one micro-batch.

    Dropout masks are a function of (seed, step, micro_step, place), so losses, gradients and weights are the
    same bits whatever the number of threads, the instruction set, or `recompute`.
    """

    @staticmethod
    def random(
        config: Config,
        *,
        batch_size: int,
        n_tokens: int,
        seed: int,
        dropout: float = 0.0,
        precision: str = "float32",
        recompute: bool = False,
        n_threads: int | None = None,
        bias: str = "all",
    ) -> Trainer: ...
    @staticmethod
    def load(
        config: Config,
        checkpoint: Checkpoint,
        *,
        batch_size: int,
        n_tokens: int,
        seed: int,
        dropout: float = 0.0,
        precision: str = "float32",
        recompute: bool = False,
        n_threads: int | None = None,
    ) -> Trainer: ...
    @staticmethod
    def of_model(model: Model, *, batch_size: int, n_tokens: int, recompute: bool = False) -> Trainer: ...
    @property
    def config(self) -> Config: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def memory_plan(self) -> list[tuple[str, int]]: ...
    def accumulate(
        self,
        inputs: NDArray[np.uint32],
        targets: NDArray[np.uint32],
        *,
        step: int,
        micro_step: int,
        scale: float,
    ) -> float: ...
    def loss(self, inputs: NDArray[np.uint32], targets: NDArray[np.uint32]) -> float: ...
    def update(
        self,
        *,
        lr: float,
        step: int,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        max_norm: float | None = 1.0,
    ) -> float: ...
    def zero_grad(self) -> None: ...
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> list[int]: ...
    def tensor(self, kind: str, name: str) -> NDArray[np.float32]: ...
    def set_tensor(self, kind: str, name: str, array: NDArray[np.float32]) -> None: ...
    def model(self, dtype: str = "float32") -> Model: ...

@final
class Sampler:
    """The settings of one returned sequence, compiled."""

    def __new__(
        cls,
        *,
        prompt_len: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        epsilon_cutoff: float | None = None,
        eta_cutoff: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        no_repeat_ngram_size: int = 0,
        bad_words_ids: Sequence[Sequence[int]] = ...,
        suppress_tokens: Sequence[int] = ...,
        logit_bias: Mapping[int, float] = ...,
        eos_token_ids: Sequence[int] = ...,
        min_new_tokens: int = 0,
        seed: int = 0,
        index: int = 0,
        logprobs: bool = False,
        top_logprobs: int = 0,
    ) -> Sampler: ...
    def choose(self, logits: NDArray[np.float32], tokens: Sequence[int]) -> Sample: ...

@final
class Sample:
    """A token that was chosen, and what the model itself thought of it."""

    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top_logprobs(self) -> list[tuple[int, float]]: ...

@final
class Speculator:
    """Where the proposals of one text come from, and how well they did so far."""

    @staticmethod
    def lookup(num_tokens: int, max_ngram: int) -> Speculator: ...
    @staticmethod
    def draft(model: Model, draft: Model, num_tokens: int) -> Speculator: ...

def probe_bandwidth(n_threads: int) -> float: ...
def probe_fma(n_threads: int) -> float: ...
def probe_dot_bf16(n_threads: int) -> float: ...
def probe_dot_int8(n_threads: int) -> float: ...
