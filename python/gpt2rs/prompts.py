"""What users pass as prompts, checked and turned into lists of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import tiktoken
    from numpy.typing import NDArray

    Tokens: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
    Prompt: TypeAlias = str | Tokens


def is_batch(prompts: object) -> bool:
    """Whether `prompts` is several prompts, that is, a sequence of texts, of sequences or of arrays."""
    return (
        not isinstance(prompts, str)
        and isinstance(prompts, Sequence)
        and len(prompts) > 0
        and isinstance(prompts[0], str | Sequence | np.ndarray)
    )


def encode(
    prompt: Prompt, tokenizer: Callable[[], tiktoken.Encoding], n_vocab: int, *, what: str = "the prompt"
) -> list[int]:
    """Token ids of one prompt, a text or a 1-D sequence of ints; not empty.

    Special tokens written out in a text (`<|endoftext|>`) are taken as such, as Hugging Face's tokenizer
    does. `tokenizer` is called for texts only.  ValueError for an empty prompt and for ids outside the
    vocabulary of `n_vocab` tokens; `what` names the prompt in its message.
    """
    if isinstance(prompt, str):
        ids = _as_array(tokenizer().encode(prompt, allowed_special="all"), what)
    else:
        ids = _as_array(prompt, what)
    if ids.size == 0:
        raise ValueError(
            f"{what} is empty; a text starts from one token at least, such as the model's own first one "
            "(config.bos_token_id)"
        )
    outside = np.flatnonzero((ids < 0) | (ids >= n_vocab))
    if outside.size:
        at = int(outside[0])
        raise ValueError(
            f"{what} has token id {ids[at]} at index {at}, outside the vocabulary of {n_vocab} tokens; "
            f"ids go from 0 to {n_vocab - 1}"
        )
    tokens: list[int] = ids.tolist()
    return tokens


def _as_array(prompt: Tokens, what: str) -> NDArray[np.integer[Any]]:
    expected = "it must be a text, or a 1-D list or array of integer token ids; several prompts go in a list"
    if not isinstance(prompt, Sequence | np.ndarray):
        raise ValueError(f"{what} is a {type(prompt).__name__}; {expected}")
    try:
        ids = np.asarray(prompt)
    except (ValueError, OverflowError):
        raise ValueError(f"{what} is a nested or uneven list; {expected}") from None
    if ids.shape == (0,):
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{what} is an array of shape {ids.shape} and dtype {ids.dtype}; {expected}")
    return ids
