"""GPT2: a model, and everything one does with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from . import _core, scoring
from .build import Build
from .generation import Text, write
from .prompts import encode, is_batch
from .results import NO_TOKENIZER, Result, Score
from .session import Session
from .settings import Options, Settings, check_count
from .streaming import Stream
from .text import TextDecoder, decode_text

if TYPE_CHECKING:
    import tiktoken
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .checkpoints import ConfigLike
    from .engine import Engine
    from .prompts import Prompt, Tokens


class GPT2:
    """A GPT-2 with its weights, ready to run; made by `from_pretrained`, `from_params` or `from_config`.

    Computes what Hugging Face's GPT2LMHeadModel computes (Radford et al. 2019, "Language Models are
    Unsupervised Multitask Learners"), to float accuracy.  The logits of a token sequence are the same bits
    whatever the number of threads, the instruction set, the batch, and the way the sequence was cut into
    calls.

    A prompt is a text or token ids (a list of int, or a 1-D NumPy integer array), wherever one is taken.
    Several threads may use one model at the same time; the GIL is released while it computes, and Ctrl-C
    stops it within a layer.  Shapes: T tokens, C = n_embd, V = n_vocab.
    """

    def __init__(
        self, core: Engine[Any], *, folder: Path | None = None, tokenizer: tiktoken.Encoding | None = None
    ) -> None:
        """Wrap a model that is loaded; its tokenizer is the one that is given, or looked for in `folder`."""
        self._core = core
        self._folder = folder
        self._given_tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        kv_dtype: Any = None,
        precision: str = "exact",
        device: str = "cpu",
        n_threads: int | None = None,
        config: ConfigLike | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> GPT2:
        """A model from a folder, a file, a name on the Hugging Face hub, or "shakespeare", which comes with
        the package.

        name_or_path: Hugging Face's folders and safetensors files, one or sharded; PyTorch's `.bin`, `.pt`
            and `.pth` (transformers', nanoGPT's, and the textbooks' names), of which no code is run; llm.c's
            `.bin`; what `save_packed` wrote.
        dtype: how the weights are held: "float32", "bfloat16", "int8" (groups of 32 with a scale, 8.5 bits a
            weight) or "int4" (groups of 16, 4.5 bits a weight).  None keeps bfloat16 and packed files and
            makes float32 of others; a packed file has its own only.
        kv_dtype: the same for keys and values: "float32", "bfloat16" or "int8"; None: that of the weights,
            int8 beside int4.
        precision: "exact", or "fast": activations are rounded to bfloat16 where they meet bfloat16 weights,
            keys and values, which makes prompts and batches faster on processors with AVX-512 BF16.
        device: "cpu"; "cuda" or "cuda:N", an NVIDIA GPU of compute capability 8.0 or newer, with the extra
            `gpt2rs[cuda]`; "auto": the first GPU that works and has the memory, else the CPU.  On a GPU
            weights, keys and values are float32 or bfloat16, and there are no packed files.
        n_threads: of the CPU; None: as many as the machine has cores for this process and the model profits
            from.
        config: for a file without one: a `Config`, a preset's name, a dict, or a config.json's path or text.
        revision, cache_dir, token, local_files_only: as `huggingface_hub` takes them.

        Raises FileNotFoundError where there is no such model, ValueError for a malformed file (naming the
        tensor or field, what was expected and what was found) and for options that don't go together,
        RuntimeError where the hub or the device is out of reach.
        """
        from .checkpoints import open_checkpoint

        build = Build(dtype, kv_dtype, precision, device, n_threads)
        source = open_checkpoint(
            name_or_path,
            config=config,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        core = build.load(source.config, source.checkpoint, source.stored_dtype)
        return cls(core, folder=source.folder)

    @classmethod
    def from_params(
        cls,
        params: Mapping[str, Any],
        *,
        n_head: int,
        dtype: Any = None,
        kv_dtype: Any = None,
        precision: str = "exact",
        device: str = "cpu",
        n_threads: int | None = None,
        **config: Any,
    ) -> GPT2:
        """A model from the nested dict of NumPy arrays that textbook implementations (picoGPT's is one) hold
        weights in.

        params: `wte` (V, C), `wpe` (n_ctx, C), `ln_f` {g, b} of (C,), and `blocks`, a list, which may be
            empty, of {ln_1 {g, b}, attn {c_attn {w (C, 3C), b}, c_proj {w (C, C), b}}, ln_2 {g, b},
            mlp {c_fc {w (C, n_inner), b}, c_proj {w (n_inner, C), b}}}.  Biases may be absent, an `lm_head`
            (V, C) given.
        n_head: no array tells it.  config: further fields of a config.json, such as `activation_function`.
        Others as for `from_pretrained`.  ValueError names the array that is missing or of a wrong shape or
        dtype.
        """
        from .checkpoints import from_params

        build = Build(dtype, kv_dtype, precision, device, n_threads)
        source = from_params(params, n_head=n_head, **config)
        return cls(build.load(source.config, source.checkpoint, source.stored_dtype))

    @classmethod
    def from_config(
        cls,
        config: ConfigLike,
        *,
        seed: int = 0,
        dtype: Any = None,
        kv_dtype: Any = None,
        precision: str = "exact",
        device: str = "cpu",
        n_threads: int | None = None,
    ) -> GPT2:
        """A model with random weights by GPT-2's initialisation, the same for the same seed.

        config: a preset ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), a `Config`, a dict with the fields
            of a config.json, or the path or text of one.
        Normal of standard deviation 0.02, the projections into the residual stream scaled by 1 / sqrt(2
        n_layer), biases 0, LayerNorm gains 1.  dtype: "float32" where it is None.  Others as for
        `from_pretrained`.
        """
        from .checkpoints import as_config

        build = Build(dtype, kv_dtype, precision, device, n_threads)
        return cls(build.random(as_config(config), check_count("seed", seed)))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and the tokenizer's files into `folder`, which transformers
        then loads.

        Weights are written in the model's dtype; the tokenizer's files are those of the folder that the model
        came from, if it had any.  Every file is written beside its place first, so that OSError (a full disk,
        say) leaves what was there before as it was.
        """
        from .saving import save_pretrained

        save_pretrained(self._core, Path(folder).expanduser(), tokenizer_folder=self._folder)

    def save_packed(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, packed.safetensors and the tokenizer's files into `folder`, which
        `from_pretrained` then opens at once, without packing.

        Weights are written as they are held, int8 and int4 among them, for this version of gpt2rs: another
        may refuse the file, by the name of its layout, so keep the model that it came from.  As for
        `save_pretrained`, OSError leaves what was there before; ValueError for a folder that has other
        weights.  The file is mapped while a model uses it: replace it, but don't write into it.
        """
        from .saving import save_packed

        save_packed(self._core, Path(folder).expanduser(), tokenizer_folder=self._folder)

    @property
    def config(self) -> _core.Config:
        """The model's shape and constants; immutable."""
        return self._core.config

    @property
    def dtype(self) -> str:
        """How weights are held: "float32", "bfloat16", "int8" or "int4"."""
        return self._core.dtype

    @property
    def kv_dtype(self) -> str:
        """How keys and values are held: "float32", "bfloat16" or "int8"."""
        return self._core.kv_dtype

    @property
    def precision(self) -> str:
        """How exactly activations enter products: "exact" or "fast"."""
        return self._core.precision

    @property
    def device(self) -> str:
        """Where the model runs: "cpu", or "cuda:N"."""
        return self._core.device

    @property
    def n_threads(self) -> int:
        """Threads of the CPU that one call computes with; 1 on a GPU."""
        return self._core.n_threads

    @property
    def isa(self) -> str:
        """The instruction set in use: "portable", "avx2", "avxvnni", "avx512", "avx512vnni" or "avx512bf16"
        (GPT2RS_ISA forces one); on a GPU its architecture, such as "sm_90"."""
        return self._core.isa

    @cached_property
    def tokenizer(self) -> tiktoken.Encoding | None:
        """The `tiktoken.Encoding` in use: that of the model's folder, else GPT-2's own where the vocabulary
        is GPT-2's.

        None where there is neither.  Loaded on first access; RuntimeError where GPT-2's own is needed and out
        of reach.
        """
        from .tokenizer import load_tokenizer

        if self._given_tokenizer is not None:
            return self._given_tokenizer
        return load_tokenizer(self._folder, self.config.n_vocab)

    def num_parameters(self, *, lm_head: bool = False) -> int:
        """Number of parameters; `lm_head=True` counts a tied head a second time (124 M against 163 M for
        GPT-2 small)."""
        return self.config.num_parameters(lm_head=lm_head)

    def memory_footprint(self) -> int:
        """Bytes of the weights as held in memory."""
        return self._core.memory_footprint()

    def __repr__(self) -> str:
        """Its size and where it runs."""
        config = self.config
        where = f"n_threads={self.n_threads}" if self.device == "cpu" else f"device={self.device!r}"
        return (
            f"GPT2({self.num_parameters() / 1e6:.1f} M parameters, n_layer={config.n_layer}, "
            f"n_embd={config.n_embd}, n_ctx={config.n_ctx}, n_vocab={config.n_vocab}, dtype={self.dtype!r}, "
            f"{where})"
        )

    # A text is never taken for a sequence of one-letter prompts, which is what the type checker warns of.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, *, num_return_sequences: None = None, **settings: Unpack[Options]
    ) -> Result: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, *, num_return_sequences: int, **settings: Unpack[Options]
    ) -> list[Result]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Tokens] | Sequence[Prompt],
        *,
        num_return_sequences: None = None,
        **settings: Unpack[Options],
    ) -> list[Result]: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Tokens] | Sequence[Prompt],
        *,
        num_return_sequences: int,
        **settings: Unpack[Options],
    ) -> list[list[Result]]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[Tokens] | Sequence[Prompt],
        *,
        num_return_sequences: int | None = None,
        **settings: Unpack[Options],
    ) -> Result | list[Result] | list[list[Result]]:
        """Continue one prompt, or several at once.

        One prompt gives one `Result`, a list of prompts a list of them; where `num_return_sequences` is
        given, be it 1, each of these is a list of that many.  The most likely text is taken unless a setting
        asks for sampling.  Prompts of different lengths go together without padding, and a prompt's answer
        does not depend on the others.  `Settings` describes all settings, with their names in Hugging Face's
        `generate`.

        Special tokens written out in a text, `<|endoftext|>`, are taken as such.

        Raises ValueError for an empty prompt, an id outside the vocabulary, a prompt and `max_new_tokens`
        that exceed `n_ctx` together, and a setting out of its range; TypeError for an unknown setting;
        RuntimeError for text where there is no tokenizer.
        """
        choice = Settings.of({**settings, "num_return_sequences": num_return_sequences})
        batch = prompts if is_batch(prompts) else [prompts]
        encoded = [
            self._encode(prompt, what=f"prompt {i}" if len(batch) > 1 else "the prompt")
            for i, prompt in enumerate(batch)
        ]
        seeds = choice.seeds(len(encoded))
        texts = [
            [
                Text(self._core, prompt, choice, seed=seed, index=index, decoder=self._stop_decoder(choice))
                for index in range(choice.num_return_sequences or 1)
            ]
            for prompt, seed in zip(encoded, seeds, strict=True)
        ]
        write(self._core, [text for group in texts for text in group])
        results = [[text.result(self._decode) for text in group] for group in texts]
        if choice.num_return_sequences is None:
            singles = [group[0] for group in results]
            return singles if batch is prompts else singles[0]
        return results if batch is prompts else results[0]

    def stream(self, prompt: Prompt, **settings: Unpack[Options]) -> Stream:
        """Continue one prompt, handing out its text piece by piece: `for piece in model.stream(...)`.

        Takes the settings of `generate` but `num_return_sequences`; the pieces joined are the text that
        `generate` gives for the same settings.  The `Stream` also has `tokens`, and at the end the `result`.
        Errors are those of `generate`, raised here rather than at the first piece; RuntimeError for a model
        without a tokenizer.
        """
        if "num_return_sequences" in settings:
            raise TypeError("num_return_sequences is a setting of generate; stream gives one text")
        choice = Settings.of(settings)
        decoder = TextDecoder(self._need_tokenizer(), choice.stop_strings)
        text = Text(self._core, self._encode(prompt), choice, seed=choice.seeds(1)[0], decoder=decoder)
        return Stream(self._core, text, decoder, self._decode)

    def session(self) -> Session:
        """An empty sequence, to be filled and continued step by step."""
        return Session(self._core, self._core.session(), self._encode)

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """(T, V) float32: row i scores the token after the first i + 1.  ValueError for more than `n_ctx`
        tokens."""
        return self._core.logits(self._fitting(prompt))

    def hidden_states(self, prompt: Prompt) -> NDArray[np.float32]:
        """(T, C) float32: the activations after `ln_f`, which the LM head is applied to.

        Hugging Face's `last_hidden_state`.  ValueError for more than `n_ctx` tokens.
        """
        return self._core.hidden_states(self._fitting(prompt))

    def score(self, prompt: Prompt, *, stride: int | None = None) -> Score:
        """How likely the model holds a text to be: a log-probability for every token but the first, and the
        perplexity.

        A text longer than `n_ctx` is read in windows of `n_ctx` tokens that advance by `stride`, 1 to n_ctx -
        1 (None: half of `n_ctx`), and every token is scored once, in the first window that holds it: beyond
        the first window with n_ctx - stride tokens or more before it.  A smaller stride is slower and nearer
        to the model's true perplexity.  This is the procedure of Hugging Face's guide "Perplexity of
        fixed-length models".

        ValueError for fewer than two tokens and for a stride out of its range.
        """
        tokens = self._encode(prompt)
        return Score(tokens, scoring.logprobs(self._core, tokens, stride))

    def _encode(self, prompt: Prompt, *, what: str = "the prompt") -> list[int]:
        return encode(prompt, self._need_tokenizer, self.config.n_vocab, what=what)

    def _fitting(self, prompt: Prompt) -> list[int]:
        tokens = self._encode(prompt)
        if len(tokens) > self.config.n_ctx:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; the model has {self.config.n_ctx} positions (n_ctx)"
            )
        return tokens

    def _need_tokenizer(self) -> tiktoken.Encoding:
        if self.tokenizer is None:
            raise RuntimeError(NO_TOKENIZER)
        return self.tokenizer

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode_text(self._need_tokenizer(), tokens)

    def _stop_decoder(self, settings: Settings) -> TextDecoder | None:
        return TextDecoder(self._need_tokenizer(), settings.stop_strings) if settings.stop_strings else None
