"""Where weights come from: a name, a folder, a file or arrays in, a `Config` and a `Checkpoint` out.

Files are told apart by their first bytes, never by their suffix. Nothing of the weights is read here: the
checkpoint says where each tensor lies, and the core reads it while packing.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub
from ._core import Checkpoint, Config
from .formats import LLMC_MAGIC, TORCH_MAGIC, ZIP_MAGIC, Placement, read_json, read_text

BUILT_IN = "shakespeare"
_MODELS = Path(__file__).parent / "models"

# What a folder is searched for, first to last; a trailing pattern has to match one file only.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "ckpt.pt",
    "packed.safetensors",
)
PACKED = _FILES[-1]
_PATTERNS = ("*.safetensors", "*.pth", "*.pt", "*.bin")
# What trainers leave beside the weights.
_NOT_WEIGHTS = {
    "training_args.bin",
    "optimizer.bin",
    "scheduler.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
}
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

ConfigLike = Config | str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A model that is ready to be loaded.

    Attributes:
        config: its configuration.
        checkpoint: where its tensors are.
        folder: where to look for its tokenizer's files; None when it came from arrays.
        stored_dtype: the dtype of the token embedding in the file: "float32", "float16", "bfloat16" or
            "float64"; of a packed file that of its weights, "int8" and "int4" among them.
        kind: what it was read from: "safetensors", "PyTorch", "nanoGPT", "textbook", "llm.c", "packed" or
            "arrays".
        layout: how the weights of a packed file lie in it; None for all others.
    """

    config: Config
    checkpoint: Checkpoint
    folder: Path | None
    stored_dtype: str
    kind: str
    layout: str | None = None


def open_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    config: ConfigLike | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Source:
    """Finds a model and reads everything about it but its weights.

    Args:
        name_or_path: "shakespeare", the model that comes with this package (a folder of that very name needs
            a separator: "./shakespeare"); else a folder or a file that exists; else the name of a model on
            the Hugging Face hub, such as "openai-community/gpt2". A folder may hold, in order of preference,
            model.safetensors, model.safetensors.index.json with its shards, pytorch_model.bin,
            pytorch_model.bin.index.json with its shards, nanoGPT's ckpt.pt, packed.safetensors, or one file
            *.safetensors, *.pth, *.pt or *.bin. A file may be any of safetensors, packed ones too, PyTorch (a
            state dict under Hugging Face's, nanoGPT's or the textbook's names) or llm.c's version 3 or 5.
        config: a `Config`, the name of a preset, the path or the text of a config.json, or its content as a
            dict. By default the file's own settings (nanoGPT, llm.c), else config.json beside it.
        revision: branch, tag or commit on the hub.
        cache_dir: where hub files are kept; huggingface_hub's own cache by default.
        token: for private and gated models on the hub.
        local_files_only: take hub files from the cache only.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is missing.
        ValueError: a file is malformed, or `config` is needed and missing.
        RuntimeError: the hub cannot be reached or refuses access, and the model is not in its cache.
    """
    given = None if config is None else as_config(config)
    name = os.fspath(name_or_path)
    if name == BUILT_IN:
        return _open_folder(built_in_folder(), given)
    path = Path(name).expanduser()
    if _exists(path):
        return _open_folder(path, given) if path.is_dir() else _open_file(path, given)
    if isinstance(name_or_path, os.PathLike) or not hub.is_repo_id(name):
        raise FileNotFoundError(f"no such folder or file: {name}")
    folder = hub.fetch(
        name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    return _open_folder(folder, given)


def built_in_folder() -> Path:
    """Where the model that comes with this package lies."""
    return _MODELS / BUILT_IN


def as_config(config: ConfigLike) -> Config:
    """The configuration that is meant by a preset's name, a config.json's path or text, or its content as a
    dict.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown preset, or a malformed config; the message names the field.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        try:
            return Config.from_json(json.dumps(dict(config), default=_as_plain))
        except (TypeError, RecursionError) as error:
            raise ValueError(f"config: {error}") from None
    text = os.fspath(config)
    if isinstance(config, str) and text.lstrip().startswith("{"):
        return Config.from_json(text)
    path = Path(text).expanduser()
    if isinstance(config, os.PathLike) or path.suffix == ".json" or _exists(path):
        return _config_file(path)
    return Config.preset(text)


def from_params(params: Mapping[str, Any], *, n_head: int, **settings: Any) -> Source:
    """A model from the nested dict of arrays that the textbook implementations load GPT-2 into.

    Args:
        params: `wte` (V, C), `wpe` (n_ctx, C), `ln_f` {g, b} (or g and b beside wte), optionally `lm_head`
            (V, C), and `blocks`, a list, which may be empty, of dicts: `ln_1` {g, b}, `attn` {c_attn {w (C,
            3C), b}, c_proj {w (C, C), b}}, `ln_2` {g, b}, `mlp` {c_fc {w (C, n_inner), b}, c_proj {w
            (n_inner, C), b}}. Biases may be absent. Arrays of float16, float32 or float64.
        n_head: number of attention heads, which no shape tells.
        settings: further fields of a config.json, such as `activation_function` ("gelu_new" by default),
            `layer_norm_epsilon` (1e-5) or `eos_token_id` (50256 where the vocabulary has it).

    Raises:
        ValueError: an array is missing, or its shape or dtype is not what it has to be; the message says
            which.
    """
    from .formats.params import named_arrays

    arrays, shapes = named_arrays(params)
    checkpoint = Checkpoint()
    for name, array in arrays.items():
        checkpoint.add_array(name, array)
    config = {
        **shapes,
        "n_head": n_head,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": "lm_head.weight" not in arrays,
        **settings,
    }
    return Source(as_config(config), checkpoint, None, arrays["wte.weight"].dtype.name, "arrays")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to be a path
        return False


def _as_plain(value: Any) -> Any:
    """NumPy's numbers as Python's, for JSON."""
    try:
        return operator.index(value)
    except TypeError:
        if hasattr(value, "item"):
            return value.item()
        raise ValueError(f"config: a {type(value).__name__} is not a JSON value") from None


def _config_file(path: Path) -> Config:
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    text = read_text(path)
    try:
        return Config.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _open_folder(folder: Path, given: Config | None) -> Source:
    for name in _FILES:
        if (folder / name).is_file():
            return _open_file(folder / name, given)
    for pattern in _PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if path.name not in _NOT_WEIGHTS)
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:10])
            raise ValueError(
                f"{folder}: several files might be the weights ({names}); give the file's own path"
            )
        if found:
            return _open_file(found[0], given)
    raise FileNotFoundError(f"{folder}: no weights found; looked for {', '.join(_FILES + _PATTERNS)}")


def _open_file(path: Path, given: Config | None) -> Source:
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    weight_map = _weight_map(path) if path.name.endswith(".index.json") else {}
    files = _shards(path, weight_map) if weight_map else [path]
    with files[0].open("rb") as file:
        start = file.read(16)
    if start.startswith((ZIP_MAGIC, TORCH_MAGIC)):
        return _open_pytorch(files, given)
    if int.from_bytes(start[:4], "little") == LLMC_MAGIC:
        return _open_llmc(files[0], given)
    if start[8:9] == b"{":
        return _open_safetensors(files, given)
    raise ValueError(f"{files[0]}: not a checkpoint: {_known_as(start)}")


def _known_as(start: bytes) -> str:
    if start.startswith(b"GGUF"):
        return "GGUF files are not supported"
    if start.startswith(b"\x89HDF"):
        return "HDF5 files are not supported"
    if start.startswith(b"\x80"):
        return "a pickle that torch.save did not write"
    return f"its first bytes, {start[:8].hex(' ')}, are none of safetensors', PyTorch's and llm.c's"


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, by an index; all files lie in the index's folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected an object with a non-empty object 'weight_map'")
    for tensor, name in weight_map.items():
        # Not resolved: the hub's cache is made of links that point out of the folder.
        plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        if not plain:
            found = repr(name[:100]) if isinstance(name, str) else f"a {type(name).__name__}"
            raise ValueError(
                f"{index}: weight_map[{tensor[:100]!r}] is {found}, expected the name of a file beside it"
            )
    return weight_map


def _shards(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The files that an index names, in order."""
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{index} names the shard {path.name}, which is missing")
    return paths


def _config_for(path: Path, given: Config | None, own: Callable[[], Config] | None = None) -> Config:
    """The config that was given, else the weight file's own, else the one beside it."""
    if given is not None:
        return given
    if own is not None:
        return own()
    beside = path.parent / "config.json"
    if beside.exists():
        return _config_file(beside)
    raise ValueError(
        f"{path} does not say what model it is and there is no config.json beside it; give config=, "
        "a preset such as 'gpt2' or the content of a config.json"
    )


def _open_safetensors(files: list[Path], given: Config | None) -> Source:
    checkpoint = Checkpoint.open_safetensors([str(path) for path in files])
    packed = checkpoint.packed()
    if packed is not None:
        own, dtype, layout = packed
        _check_same(files[0], own, given)
        return Source(own, checkpoint, files[0].parent, dtype, "packed", layout)
    config = _config_for(files[0], given)
    for path in files:
        stored = _embedding_dtype(path)
        if stored is not None:
            return Source(config, checkpoint, path.parent, stored, "safetensors")
    raise ValueError(f"{files[0]}: no tensor wte.weight of a floating-point type")


def _check_same(path: Path, own: Config, given: Config | None) -> None:
    """ValueError where a packed file was given another config than its own, or stands beside one."""
    beside = path.parent / "config.json"
    name = "config"
    if given is None and path.name == PACKED and beside.exists():
        given, name = _config_file(beside), str(beside)
    if given is None or given == own:
        return
    theirs, ours = json.loads(given.to_json()), json.loads(own.to_json())
    field = next((key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)), "a field")
    raise ValueError(
        f"{path}: the file's own config has {field} = {json.dumps(ours.get(field))}, {name} has "
        f"{json.dumps(theirs.get(field))}; a packed file's config is fixed, convert the model again"
    )


def weights_beside_packed(folder: Path) -> Path | None:
    """A file that `from_pretrained` would take from this folder in place of a packed one."""
    return next((folder / name for name in _FILES[:-1] if (folder / name).is_file()), None)


def _embedding_dtype(path: Path) -> str | None:
    """The type of the token embedding; the core has checked the header before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name in ("transformer.wte.weight", "wte.weight"):
        if name in header:
            return _SAFETENSORS_DTYPES.get(header[name]["dtype"])
    return None


def _open_pytorch(files: list[Path], given: Config | None) -> Source:
    from .formats.state_dict import read_state_dict

    placements: list[Placement] = []
    model_args: dict[str, Any] | None = None
    tied: bool | None = None
    for path in files:
        state = read_state_dict(path)
        twice = {placement.name for placement in placements} & {
            placement.name for placement in state.placements
        }
        if twice:
            raise ValueError(f"{path}: tensor {min(twice)} is in another shard too")
        placements += state.placements
        model_args = model_args or state.model_args
        tied = state.tied if tied is None else tied
    own = None if model_args is None else lambda: _nanogpt_config(files[0], model_args)
    config = _config_for(files[0], given, own)
    if tied is not None and config.tie_word_embeddings != tied:
        # The file decides: the textbook's models have a head of their own, whatever the config's default is.
        config = Config.from_json(json.dumps(json.loads(config.to_json()) | {"tie_word_embeddings": tied}))
    kind = "nanoGPT" if model_args is not None else "PyTorch" if tied is None else "textbook"
    return _placed(files[0], placements, config, kind)


def _nanogpt_config(path: Path, model_args: dict[str, Any]) -> Config:
    """The config that nanoGPT's model_args describe; only their plain values matter."""
    plain = {key: value for key, value in model_args.items() if isinstance(value, (int, float, str))}
    try:
        return as_config(plain)
    except ValueError as error:
        raise ValueError(f"{path}: model_args: {error}") from None


def _open_llmc(path: Path, given: Config | None) -> Source:
    from .formats.llmc import read_llmc

    file = read_llmc(path)
    return _placed(path, file.placements, _config_for(path, given, lambda: as_config(file.config)), "llm.c")


def _placed(path: Path, placements: list[Placement], config: Config, kind: str) -> Source:
    checkpoint = Checkpoint()
    stored_dtype = None
    for placement in placements:
        tensor = placement.tensor
        if tensor.dtype not in _SAFETENSORS_DTYPES.values():
            raise ValueError(
                f"{tensor.path}: tensor {placement.name} is {tensor.dtype}, expected a floating-point type"
            )
        if placement.name.endswith("wte.weight"):
            stored_dtype = tensor.dtype
        checkpoint.add_file(
            placement.name,
            tensor.path,
            tensor.offset,
            tensor.dtype,
            list(tensor.shape),
            transposed=placement.transposed,
        )
    if stored_dtype is None:
        raise ValueError(f"{path}: tensor wte.weight is missing")
    return Source(config, checkpoint, path.parent, stored_dtype, kind)
