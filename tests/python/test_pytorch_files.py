"""What torch.save wrote gives the bits that the same arrays give when they come from memory."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2rs.checkpoints import open_checkpoint
from small_models import (
    CONFIG,
    N_CTX,
    N_HEAD,
    N_LAYER,
    TEXTBOOK_CONFIG,
    C,
    V,
    draw,
    from_arrays,
    from_file,
    hugging_face,
    parameters,
    textbook,
)
from torch_files import Call, Pickled, View, save, save_zip


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
    with pytest.raises(ValueError, match=r"0 entries data\.pkl"):
        open_checkpoint(zip_of(tmp_path / "a.pt", data_pkl=None), config=CONFIG)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    saved = Pickled({"wte.weight": draw(0, V, C)})
    save_zip(tmp_path / "a.pt", {"data.pkl": saved.bytes}, saved.storages, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"'archive/data\.pkl' is compressed"):
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
