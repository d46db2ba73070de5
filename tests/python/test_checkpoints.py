"""Where weights come from: names, folders, files, shards and configs."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2rs
from golden_cases import CASES, expected
from gpt2rs import _core
from gpt2rs.checkpoints import as_config, open_checkpoint
from small_models import (
    CONFIG,
    C,
    V,
    draw,
    from_arrays,
    from_file,
    hugging_face,
    parameters,
)
from torch_files import save

FILES = {
    "plain": "model.safetensors",
    "float16_sharded": "model.safetensors.index.json",
    "pytorch_bin": "pytorch_model.bin",
    "nanogpt_ckpt": "ckpt.pt",
    "textbook_pth": "model.pth",
    "llmc_fp32": "model.bin",
    "llmc_bf16": "model.bin",
}


@pytest.mark.parametrize("name", FILES)
def test_a_bare_file_is_as_good_as_its_folder(name: str, tmp_path: Path) -> None:
    ids = expected(name)["input_ids"][0]
    folder = gpt2rs.GPT2.from_pretrained(CASES[name])
    file = gpt2rs.GPT2.from_pretrained(CASES[name] / FILES[name])
    np.testing.assert_array_equal(folder.logits(ids), file.logits(ids))
    # Under another name and on its own: the file is told by its content, the config is given.
    if not name.endswith("sharded"):
        shutil.copy(CASES[name] / FILES[name], tmp_path / "weights")
        alone = gpt2rs.GPT2.from_pretrained(tmp_path / "weights", config=folder.config)
        np.testing.assert_array_equal(folder.logits(ids), alone.logits(ids))


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("plain", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16_sharded", "float16"),
        ("llmc_bf16", "bfloat16"),
    ],
)
def test_stored_dtype(name: str, stored: str) -> None:
    assert open_checkpoint(CASES[name]).stored_dtype == stored


@pytest.mark.parametrize(
    "form",
    [
        lambda path: path,
        str,
        lambda path: path.read_text(encoding="utf-8"),
        lambda path: json.loads(path.read_text(encoding="utf-8")),
        lambda path: {
            key: np.array(value) if isinstance(value, int) else value for key, value in CONFIG.items()
        },
        lambda path: as_config(path),
    ],
    ids=["path", "path as str", "text", "dict", "dict of NumPy integers", "Config"],
)
def test_every_form_of_a_config(tmp_path: Path, form: Callable[[Path], Any]) -> None:
    params = parameters()
    path = save(tmp_path / "weights.bin", hugging_face(params))
    with pytest.raises(ValueError, match=r"does not say what model it is.*give config="):
        open_checkpoint(path)
    (tmp_path / "given.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    np.testing.assert_array_equal(from_file(path, form(tmp_path / "given.json")), from_arrays(params))
    # Beside the weights it needs not be given.
    (tmp_path / "given.json").rename(tmp_path / "config.json")
    np.testing.assert_array_equal(from_file(path), from_arrays(params))


def test_presets_and_their_refusals() -> None:
    assert (as_config("gpt2-medium").n_layer, as_config("gpt2-medium").n_embd) == (24, 1024)
    with pytest.raises(ValueError, match="gpt3"):
        as_config("gpt3")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        as_config("nowhere.json")
    with pytest.raises(ValueError, match="object is not a JSON value"):
        as_config({"n_embd": object()})


def test_a_malformed_config_names_its_file(tmp_path: Path) -> None:
    shutil.copy(CASES["plain"] / "model.safetensors", tmp_path)
    for content in (b'{"n_embd": "wide"}', b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            open_checkpoint(tmp_path)


def test_preference_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(
        FileNotFoundError, match=r"no weights found; looked for model\.safetensors, .*\*\.bin"
    ):
        open_checkpoint(tmp_path)
    for number, name in enumerate(["a.bin", "a.pth", "ckpt.pt", "pytorch_model.bin"]):
        params = parameters()
        params["wte"] = draw(5000 + number, V, C)
        save(tmp_path / name, hugging_face(params))
        np.testing.assert_array_equal(from_file(tmp_path), from_arrays(params))


def test_what_trainers_leave_is_no_weights(tmp_path: Path) -> None:
    params = parameters()
    save(tmp_path / "model.bin", hugging_face(params))
    (tmp_path / "training_args.bin").write_bytes(b"PK\x03\x04")
    (tmp_path / "optimizer.pt").write_bytes(b"PK\x03\x04")
    np.testing.assert_array_equal(from_file(tmp_path, CONFIG), from_arrays(params))


def test_two_candidates_are_both_named(tmp_path: Path) -> None:
    for name in ("one.pth", "two.pth"):
        save(tmp_path / name, hugging_face(parameters()))
    with pytest.raises(ValueError, match=r"one\.pth, two\.pth"):
        open_checkpoint(tmp_path, config=CONFIG)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"GGUF\x03\0\0\0", "GGUF files are not supported"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 files are not supported"),
        (b"\x80\x04K\x01.", "a pickle that torch.save did not write"),
        (b"once upon a time", "its first bytes, 6f 6e 63 65"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "weights", config=CONFIG)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nowhere", "a/b/c", "~/no such folder", "x" * 5000, ""]
)
def test_names_that_can_only_be_paths(name: str) -> None:
    if name == "":
        # The empty path is the working directory, as for every program.
        with pytest.raises(FileNotFoundError, match="no weights found"):
            open_checkpoint(name)
        return
    with pytest.raises(FileNotFoundError, match=re.escape(name[:100])):
        open_checkpoint(name)


def test_the_built_in_model_and_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shakespeare").mkdir()
    shutil.copy(CASES["plain"] / "model.safetensors", tmp_path / "shakespeare")
    shutil.copy(CASES["plain"] / "config.json", tmp_path / "shakespeare")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("shakespeare").config.n_vocab == 1024
    assert open_checkpoint("./shakespeare").config.n_vocab == 512
    assert open_checkpoint(Path("shakespeare").absolute()).config.n_vocab == 512


def test_folders_do_without_the_hub() -> None:
    code = (
        "import sys, gpt2rs.checkpoints as c; c.open_checkpoint(sys.argv[1]); "
        "assert 'huggingface_hub' not in sys.modules and 'tiktoken' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(CASES["pytorch_bin"])], check=True)


# ---- sharded


def sharded(folder: Path, weight_map: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def test_a_sharded_pytorch_model(tmp_path: Path) -> None:
    params = parameters()
    state = hugging_face(params)
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, part in shards.items():
        save(tmp_path / shard, {name: state[name] for name in part})
    sharded(tmp_path, {name: shard for shard, part in shards.items() for name in part})
    np.testing.assert_array_equal(from_file(tmp_path), from_arrays(params))
    save(tmp_path / "pytorch_model-00002-of-00002.bin", state)
    with pytest.raises(ValueError, match=r"00002-of-00002\.bin: tensor .* is in another shard too"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json", "model-00001-of-00005.safetensors"):
        shutil.copy(CASES["float16_sharded"] / name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"names the shard model-00002-of-00005\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../escape.bin", "/etc/passwd", "sub/a.bin", "..", "", "a\0b", "C:a.bin", "a\\b"]
)
def test_shards_stay_in_their_folder(tmp_path: Path, shard: str) -> None:
    with pytest.raises(
        ValueError, match=r"weight_map\['wte.weight'\] is .*, expected the name of a file beside it"
    ):
        open_checkpoint(sharded(tmp_path, {"wte.weight": shard}))


@pytest.mark.parametrize("weight_map", [None, {}, [], "a.bin", {"wte.weight": 3}, {"wte.weight": ["a.bin"]}])
def test_indexes_that_are_none(tmp_path: Path, weight_map: Any) -> None:
    with pytest.raises(ValueError, match=r"index\.json.*weight_map"):
        open_checkpoint(sharded(tmp_path, weight_map))


# ---- llm.c


def llmc_header(**fields: int) -> bytes:
    values = {"magic": 20240326, "version": 3, "maxT": 4, "V": 5, "L": 1, "NH": 2, "C": 4, "Vp": 8} | fields
    return struct.pack("<8i", *values.values()).ljust(1024, b"\0")


def llmc_bytes(header: bytes) -> bytes:
    parameters = 8 * 4 + 4 * 4 + (12 * 16 + 13 * 4) + 2 * 4
    return header + bytes(4 * parameters)


def test_llmc_padding_is_left_out() -> None:
    source = open_checkpoint(CASES["llmc_fp32"])
    assert source.checkpoint.shape("wte.weight") == [500, 64]
    assert source.config.n_vocab == 500
    assert expected("llmc_fp32")["logits"].shape[-1] == 500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 4}, "version 4, expected magic 20240326 version 3 or 5"),
        ({"maxT": 0}, "header field maxT is 0"),
        ({"V": -1}, "header field V is -1"),
        ({"L": -1}, "header field L is -1"),
        ({"L": 1 << 30}, "header field L is 1073741824"),
        ({"NH": 0}, "header field NH is 0"),
        ({"C": 1 << 30}, "header field C is 1073741824"),
        ({"Vp": 4}, "header field Vp is 4, expected at least V, 5"),
        ({"maxT": 5}, r"\d+ bytes, expected \d+ for the model its header describes"),
        ({"NH": 3}, "n_head"),
    ],
)
def test_llmc_headers(tmp_path: Path, fields: dict[str, int], message: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(llmc_bytes(llmc_header()))
    assert open_checkpoint(path).config.n_ctx == 4
    path.write_bytes(llmc_bytes(llmc_header(**fields)))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("length", [4, 1023, 1024, -1])
def test_a_cut_off_llmc_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(llmc_bytes(llmc_header())[:length])
    with pytest.raises(ValueError, match=r"model\.bin: \d+ bytes, expected"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "lm_head.weight"])
def test_transposed_embeddings_are_refused(name: str) -> None:
    """As a view may be in a PyTorch file; their rows are taken one by one."""
    checkpoint = _core.Checkpoint()
    for each, array in hugging_face(parameters(head=True)).items():
        stored = np.ascontiguousarray(array.T) if each == name else array
        checkpoint.add_array(each, stored, transposed=each == name)
    config = as_config({**CONFIG, "tie_word_embeddings": False})
    message = f"tensor {name}: an embedding must be stored"
    with pytest.raises(ValueError, match=message):
        _core.Model.load(config, checkpoint, dtype="float32")
    with pytest.raises(ValueError, match=message):
        _core.Tensors.of(config, checkpoint).get(name)
    with pytest.raises(ValueError, match=message):
        _core.Trainer.load(config, checkpoint, batch_size=1, n_tokens=4, seed=0)
