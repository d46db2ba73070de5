"""Where weights come from: every form of file gives the bits that the same arrays give when they come from memory."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import CASES, expected
from safetensors.numpy import load_file
from torch_files import Call, Pickled, View, save, save_zip

import gpt2rs
from gpt2rs.checkpoints import Source, as_config, from_params, open_checkpoint

C, V, N_CTX, N_LAYER, N_HEAD = 8, 11, 6, 2, 2
IDS = [3, 0, 10, 7]
CONFIG = {"vocab_size": V, "n_positions": N_CTX, "n_embd": C, "n_layer": N_LAYER, "n_head": N_HEAD}
TEXTBOOK_CONFIG = {
    "vocab_size": V,
    "context_length": N_CTX,
    "emb_dim": C,
    "n_layers": N_LAYER,
    "n_heads": N_HEAD,
    "drop_rate": 0.1,
    "qkv_bias": True,
}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(*, biases: bool = True, head: bool = False) -> dict[str, Any]:
    """The textbooks' nested dict, with random numbers."""
    seeds = iter(range(1000))

    def norm() -> dict[str, np.ndarray]:
        return {"g": draw(next(seeds), C), **({"b": draw(next(seeds), C)} if biases else {})}

    def linear(n_in: int, n_out: int) -> dict[str, np.ndarray]:
        return {"w": draw(next(seeds), n_in, n_out), **({"b": draw(next(seeds), n_out)} if biases else {})}

    params = {"wte": draw(next(seeds), V, C), "wpe": draw(next(seeds), N_CTX, C), "ln_f": norm()}
    params["blocks"] = [
        {
            "ln_1": norm(),
            "attn": {"c_attn": linear(C, 3 * C), "c_proj": linear(C, C)},
            "ln_2": norm(),
            "mlp": {"c_fc": linear(C, 4 * C), "c_proj": linear(4 * C, C)},
        }
        for _ in range(N_LAYER)
    ]
    return {**params, **({"lm_head": draw(next(seeds), V, C)} if head else {})}


def hugging_face(params: dict[str, Any], *, prefix: str = "", linear: bool = False) -> dict[str, Any]:
    """The same parameters under Hugging Face's names; with `linear` as nanoGPT stores them, (out, in)."""
    kinds = {"g": "weight", "b": "bias", "w": "weight"}
    state = {f"{prefix}wte.weight": params["wte"], f"{prefix}wpe.weight": params["wpe"]}

    def add(name: str, layer: dict[str, np.ndarray]) -> None:
        for key, array in layer.items():
            transposed = linear and key == "w"
            state[f"{prefix}{name}.{kinds[key]}"] = np.ascontiguousarray(array.T) if transposed else array

    for number, block in enumerate(params["blocks"]):
        for norm in ("ln_1", "ln_2"):
            add(f"h.{number}.{norm}", block[norm])
        for part, layer in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            add(f"h.{number}.{part}.{layer}", block[part][layer])
    add("ln_f", params["ln_f"])
    state["lm_head.weight"] = params.get("lm_head", params["wte"])
    return state


def textbook(params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters as the textbook's GPTModel names and stores them, mask included."""
    state = {
        "tok_emb.weight": params["wte"],
        "pos_emb.weight": params["wpe"],
        "final_norm.scale": params["ln_f"]["g"],
        "final_norm.shift": params["ln_f"]["b"],
        "out_head.weight": params.get("lm_head", params["wte"]),
    }

    def add(name: str, layer: dict[str, np.ndarray]) -> None:
        state[f"{name}.weight"] = np.ascontiguousarray(layer["w"].T)
        state[f"{name}.bias"] = layer["b"]

    for number, block in enumerate(params["blocks"]):
        at = f"trf_blocks.{number}"
        state[f"{at}.att.mask"] = np.triu(np.ones((N_CTX, N_CTX), np.float32), 1)
        whole = block["attn"]["c_attn"]
        # Not in the order of the parts, which only their names tell.
        for part in (1, 2, 0):
            name = ("W_query", "W_key", "W_value")[part]
            columns = slice(part * C, (part + 1) * C)
            add(f"{at}.att.{name}", {"w": whole["w"][:, columns], "b": whole["b"][columns]})
        add(f"{at}.att.out_proj", block["attn"]["c_proj"])
        add(f"{at}.ff.layers.0", block["mlp"]["c_fc"])
        add(f"{at}.ff.layers.2", block["mlp"]["c_proj"])
        for theirs, ours in (("norm1", "ln_1"), ("norm2", "ln_2")):
            state[f"{at}.{theirs}.scale"], state[f"{at}.{theirs}.shift"] = block[ours]["g"], block[ours]["b"]
    return state


def from_arrays(params: dict[str, Any], **config: Any) -> np.ndarray:
    return gpt2rs.GPT2.from_params(params, n_head=N_HEAD, **config).logits(IDS)


def from_file(path: Path, config: Any = None) -> np.ndarray:
    return gpt2rs.GPT2.from_pretrained(path, config=config).logits(IDS)


# ---- files of torch.save


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_hugging_face_state_dict(tmp_path: Path, legacy: bool, prefix: str) -> None:
    params = parameters()
    state = hugging_face(params, prefix=prefix)
    # The causal masks of old versions were tensors of their own.
    state[f"{prefix}h.0.attn.bias"] = np.tri(N_CTX, dtype=np.uint8).reshape(1, 1, N_CTX, N_CTX)
    state[f"{prefix}h.0.attn.masked_bias"] = np.float32([-1e4]).reshape(())
    path = save(tmp_path / "weights.bin", state, legacy=legacy)
    np.testing.assert_array_equal(from_file(path, CONFIG), from_arrays(params))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "prefix", ["transformer.", "_orig_mod.transformer.", "module._orig_mod.transformer."]
)
def test_nanogpt(tmp_path: Path, legacy: bool, prefix: str) -> None:
    params = parameters(biases=False)
    wrapper = prefix.removesuffix("transformer.")
    state = {
        f"{wrapper}{name}": array
        for name, array in hugging_face(params, prefix="transformer.", linear=True).items()
    }
    model_args = {"block_size": N_CTX, "bias": False, "dropout": 0.1}
    model_args |= {"vocab_size": V, "n_embd": C, "n_layer": N_LAYER, "n_head": N_HEAD}
    optimizer = {"state": {0: {"step": 3, "exp_avg": params["wte"]}}, "param_groups": [{"lr": 1e-3}]}
    content = {"model": state, "optimizer": optimizer, "model_args": model_args, "iter_num": 7}
    save(tmp_path / "ckpt.pt", content, legacy=legacy)
    source = open_checkpoint(tmp_path)
    assert source.config.activation_function == "gelu"
    assert source.config.tie_word_embeddings
    np.testing.assert_array_equal(from_file(tmp_path), from_arrays(params, activation_function="gelu"))


def test_linear_weights_are_told_by_their_shape(tmp_path: Path) -> None:
    """A state dict of nanoGPT's saved on its own: nothing but c_attn's shape tells that it is (out, in)."""
    params = parameters()
    path = save(tmp_path / "model.pt", hugging_face(params, linear=True))
    np.testing.assert_array_equal(from_file(path, CONFIG), from_arrays(params))


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("head", [False, True], ids=["tied", "untied"])
def test_textbook(tmp_path: Path, wrapper: str | None, head: bool) -> None:
    params = parameters(head=head)
    state = textbook(params)
    path = save(tmp_path / "model.pth", {wrapper: state, "epoch": 3} if wrapper else state)
    assert open_checkpoint(path, config=TEXTBOOK_CONFIG).config.tie_word_embeddings is not head
    np.testing.assert_array_equal(from_file(path, TEXTBOOK_CONFIG), from_arrays(params))


def test_the_head_of_a_textbook_file_counts_whatever_the_config_says(tmp_path: Path) -> None:
    params = parameters(head=True)
    path = save(tmp_path / "model.pth", textbook(params))
    np.testing.assert_array_equal(
        from_file(path, CONFIG | {"tie_word_embeddings": True}), from_arrays(params)
    )


def test_views(tmp_path: Path) -> None:
    """A tensor may start inside its storage, share it, and lie transposed in it."""
    params = parameters()
    state = hugging_face(params)
    together = np.concatenate([params["wpe"].reshape(-1), params["wte"].reshape(-1)])
    state["wpe.weight"] = View(together, 0, (N_CTX, C), (C, 1))
    state["wte.weight"] = View(together, N_CTX * C, (V, C), (C, 1))
    for number, block in enumerate(params["blocks"]):
        state[f"h.{number}.mlp.c_fc.weight"] = np.asfortranarray(block["mlp"]["c_fc"]["w"])
        state[f"h.{number}.attn.c_proj.weight"] = np.asfortranarray(block["attn"]["c_proj"]["w"])
    path = save(tmp_path / "weights.bin", state)
    np.testing.assert_array_equal(from_file(path, CONFIG), from_arrays(params))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            View(draw(0, 2 * V * C), 0, (V, C), (2 * C, 1)),
            r"tensor wte.weight of shape \[11, 8\] has strides",
        ),
        (View(draw(0, C), 0, (V, C), (0, 1)), r"tensor wte.weight of shape \[11, 8\] has strides \[0, 1\]"),
        (View(draw(0, V * C), 1, (V, C), (C, 1)), r"reaches past the 88 elements of storage '0'"),
        (View(draw(0, V * C), -1, (V, C), (C, 1)), "without a storage or an offset"),
        (View(draw(0, V * C), 0, (V, C), (C,)), "2 dimensions and 1 strides"),
        (View(draw(0, V * C), 0, (V, 1 << 61), (1 << 61, 1)), "reaches past"),
        (np.ones((V, C), np.int64), "tensor wte.weight is int64, expected a floating-point type"),
    ],
)
def test_tensors_that_cannot_be_read(tmp_path: Path, tensor: Any, message: str) -> None:
    path = save(tmp_path / "weights.bin", {"wte.weight": tensor})
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(path, config=CONFIG)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("which", ["W_query", "W_key", "W_value"])
def test_a_third_of_attention_that_is_missing_is_named(tmp_path: Path, which: str) -> None:
    state = textbook(parameters())
    del state[f"trf_blocks.1.att.{which}.bias"]
    path = save(tmp_path / "model.pth", state)
    with pytest.raises(ValueError, match=rf"trf_blocks\.1\.att\.{which}\.bias is missing"):
        open_checkpoint(path, config=TEXTBOOK_CONFIG)


def test_an_unknown_textbook_tensor_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pth", {**textbook(parameters()), "trf_blocks.0.extra.weight": draw(0, 2)})
    with pytest.raises(ValueError, match=r"trf_blocks\.0\.extra\.weight is not one of the textbook's"):
        open_checkpoint(path, config=TEXTBOOK_CONFIG)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no state dict"),
        ([1, 2], "no state dict"),
        (7, "no state dict"),
        ({"model": {"a": 1}}, "no state dict"),
        ({"wte.weight": draw(0, V, C), "epoch": 3}, "entry 'epoch' is a int"),
        ({"wte.weight": draw(0, V, C), 3: draw(0, V, C)}, "entry '3'"),
        ({"a.weight": draw(0, V, C), "module.a.weight": draw(0, V, C)}, "a.weight is there twice"),
        ({"wpe.weight": draw(0, N_CTX, C)}, "wte.weight is missing"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    path = save(tmp_path / "weights.bin", content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path, config=CONFIG)


def zip_of(path: Path, **records: bytes | None) -> Path:
    saved = Pickled({"wte.weight": draw(0, V, C)})
    whole = {"data.pkl": saved.bytes, "byteorder": b"little"} | {
        name.replace("_", "."): content for name, content in records.items()
    }
    save_zip(path, {name: content for name, content in whole.items() if content is not None}, saved.storages)
    return path


def test_big_endian_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its byte order is 'big', expected 'little'"):
        open_checkpoint(zip_of(tmp_path / "a.pt", byteorder=b"big"), config=CONFIG)


def test_an_archive_without_a_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 entries data.pkl"):
        open_checkpoint(zip_of(tmp_path / "a.pt", data_pkl=None), config=CONFIG)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    saved = Pickled({"wte.weight": draw(0, V, C)})
    save_zip(tmp_path / "a.pt", {"data.pkl": saved.bytes}, saved.storages, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="'archive/data.pkl' is compressed"):
        open_checkpoint(tmp_path / "a.pt", config=CONFIG)


def test_a_missing_storage_is_named(tmp_path: Path) -> None:
    save_zip(tmp_path / "a.pt", {"data.pkl": Pickled({"wte.weight": draw(0, V, C)}).bytes}, {})
    with pytest.raises(ValueError, match="storage 'archive/data/0' is missing"):
        open_checkpoint(tmp_path / "a.pt", config=CONFIG)


def test_a_storage_of_another_length_is_named(tmp_path: Path) -> None:
    pickle = Pickled({"wte.weight": draw(0, V, C)}).bytes
    save_zip(tmp_path / "a.pt", {"data.pkl": pickle}, {"0": draw(0, V * C - 1)})
    with pytest.raises(ValueError, match="'archive/data/0' has 348 bytes, expected 88 elements of float32"):
        open_checkpoint(tmp_path / "a.pt", config=CONFIG)


def test_python_objects_are_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.pt", {"args": Call("argparse Namespace", ()), "model": hugging_face(parameters())}
    )
    with pytest.raises(ValueError, match=r"it names 'argparse\.Namespace'"):
        open_checkpoint(path, config=CONFIG)


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


# ---- folders, bare files, configs


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


# ---- arrays


def test_parameters_without_blocks() -> None:
    want = expected("no_blocks")
    stored = load_file(CASES["no_blocks"] / "model.safetensors")
    params: dict[str, Any] = {name: stored[f"transformer.{name}.weight"] for name in ("wte", "wpe")}
    params["ln_f"] = {"g": stored["transformer.ln_f.weight"], "b": stored["transformer.ln_f.bias"]}
    for blocks in ({}, {"blocks": []}, {"blocks": ()}):
        model = gpt2rs.GPT2.from_params({**params, **blocks}, n_head=2)
        assert model.config.n_layer == 0
        for ids, logits in zip(want["input_ids"], want["logits"], strict=True):
            np.testing.assert_allclose(model.logits(ids), logits, rtol=0, atol=1e-5)


def test_a_final_norm_at_the_top() -> None:
    """The textbook's loader of OpenAI's files leaves ln_f's arrays beside wte."""
    params = parameters()
    flat = {key: value for key, value in params.items() if key != "ln_f"} | params["ln_f"]
    np.testing.assert_array_equal(from_arrays(flat), from_arrays(params))


def test_dtypes_orders_and_views_of_arrays() -> None:
    params = parameters()
    c_fc = params["blocks"][0]["mlp"]["c_fc"]
    want = from_arrays(params)
    for form in (np.asfortranarray, np.float64, lambda w: np.repeat(w, 2, axis=1)[:, ::2], np.ndarray.tolist):
        params["blocks"][0]["mlp"]["c_fc"] = {**c_fc, "w": form(c_fc["w"])}
        np.testing.assert_array_equal(from_arrays(params), want)


def test_settings_of_parameters() -> None:
    params = parameters()
    source = from_params(
        params, n_head=4, activation_function="relu", layer_norm_epsilon=1e-6, eos_token_id=3
    )
    assert isinstance(source, Source)
    assert (source.config.n_head, source.config.head_size) == (4, 2)
    assert (source.config.activation_function, source.config.eos_token_id) == ("relu", 3)
    assert source.config.layer_norm_epsilon == pytest.approx(1e-6)
    assert source.folder is None
    assert source.stored_dtype == "float32"
    assert not from_params(parameters(head=True), n_head=2).config.tie_word_embeddings
    with pytest.raises(ValueError, match="n_head"):
        from_params(params, n_head=3)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The nested dict with one entry replaced, or removed for a value of None."""
    params = parameters()
    holder: Any = params
    *route, last = path.split("/")
    for key in route:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return params


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("wte", None, r"wte: missing, expected an array of shape \(any, any\)"),
        ("wte", draw(0, V), r"wte: shape \(11\), expected \(any, any\)"),
        ("wte", draw(0, 0, C), r"wte: shape \(0, 8\)"),
        ("wte", np.ones((V, C), np.int64), "wte: dtype int64, expected float16, float32 or float64"),
        ("wte", "words", "wte: dtype <U5"),
        ("wpe", draw(0, N_CTX, C + 1), r"wpe: shape \(6, 9\), expected \(any, 8\)"),
        ("ln_f", None, "ln_f: expected a dict, found nothing"),
        ("ln_f/g", draw(0, C + 1), r"ln_f\.g: shape \(9\), expected \(8\)"),
        ("blocks", {"0": 1}, "blocks: expected a list of dicts, found dict"),
        (
            "blocks/1/attn/c_attn/w",
            draw(0, C, C),
            r"blocks\[1\]\.attn\.c_attn\.w: shape \(8, 8\), expected \(8, 24\)",
        ),
        (
            "blocks/1/mlp/c_fc/w",
            draw(0, C, 7),
            r"blocks\[1\]\.mlp\.c_fc\.w: shape \(8, 7\), expected \(8, 32\)",
        ),
        ("blocks/0/mlp/c_proj/b", draw(0, 1), r"blocks\[0\]\.mlp\.c_proj\.b: shape \(1\), expected \(8\)"),
        ("blocks/0/mlp/c_proj/w", None, r"blocks\[0\]\.mlp\.c_proj\.w: missing"),
        ("blocks/0/ln_2", 3, r"blocks\[0\]\.ln_2: expected a dict, found int"),
        ("blocks/0/attn/c_attn/bias", draw(0, 3 * C), r"blocks\[0\]\.attn\.c_attn: unknown entry 'bias'"),
        ("wpos", draw(0, 2, 2), "params: unknown entry 'wpos'"),
    ],
)
def test_parameters_that_do_not_fit(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_params(changed(path, value), n_head=N_HEAD)
