"""Packed files: the bits of the models they were made of, by folder or file; what does not fit is named."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpt2rs
from golden_cases import CASES, expected
from test_cli import COMMAND, error, output

DTYPES = ("float32", "bfloat16", "int8", "int4")
# Larger than a huge page, so that the file is mapped where the system puts it on them.
LARGER = {"vocab_size": 9001, "n_positions": 16, "n_embd": 320, "n_layer": 1, "n_head": 5}


@pytest.fixture
def packed(plain: gpt2rs.GPT2, tmp_path: Path) -> Path:
    """A folder with the plain model in int8."""
    model = gpt2rs.GPT2.from_pretrained(CASES["plain"], dtype="int8")
    model.save_packed(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_shapes", "untied_relu_layer_scaled", "no_blocks", "nanogpt_ckpt"])
def test_packed_models_open_with_the_same_bits(name: str, dtype: str, tmp_path: Path) -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES[name], dtype=dtype)
    folder = tmp_path / "new" / "folder"
    model.save_packed(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "packed.safetensors"]
    for path in (folder, folder / "packed.safetensors"):
        opened = gpt2rs.GPT2.from_pretrained(path)
        assert (opened.dtype, opened.kv_dtype) == (model.dtype, model.kv_dtype)
        assert opened.config == model.config
        for ids in expected(name)["input_ids"]:
            np.testing.assert_array_equal(opened.logits(ids), model.logits(ids))


def test_the_file_alone_is_enough(packed: Path, tmp_path: Path) -> None:
    alone = tmp_path / "any.name"
    (packed / "packed.safetensors").rename(alone)
    model = gpt2rs.GPT2.from_pretrained(CASES["plain"], dtype="int8")
    np.testing.assert_array_equal(gpt2rs.GPT2.from_pretrained(alone).logits([1, 2]), model.logits([1, 2]))


def test_the_tokenizer_comes_along(shakespeare: gpt2rs.GPT2, tmp_path: Path) -> None:
    shakespeare.save_packed(tmp_path)
    opened = gpt2rs.GPT2.from_pretrained(tmp_path)
    assert opened.dtype == shakespeare.dtype
    text = opened.generate("ROMEO:", max_new_tokens=8).text
    assert text == shakespeare.generate("ROMEO:", max_new_tokens=8).text


def test_the_dtype_is_the_files(packed: Path) -> None:
    assert gpt2rs.GPT2.from_pretrained(packed, dtype="int8", kv_dtype="float32").kv_dtype == "float32"
    for dtype in ("float32", "bfloat16", "int4"):
        with pytest.raises(ValueError, match=rf"packed\.safetensors.*packed as int8, dtype is {dtype}"):
            gpt2rs.GPT2.from_pretrained(packed, dtype=dtype)
    with pytest.raises(ValueError, match=r'"fast" is for bfloat16 weights; these are int8'):
        gpt2rs.GPT2.from_pretrained(packed, precision="fast")


def test_fast_beside_packed_bfloat16(tmp_path: Path) -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES["plain"], precision="fast")
    model.save_packed(tmp_path)
    opened = gpt2rs.GPT2.from_pretrained(tmp_path, precision="fast")
    np.testing.assert_array_equal(opened.logits([1, 2, 3]), model.logits([1, 2, 3]))


def test_the_config_is_the_files(packed: Path) -> None:
    text = (packed / "config.json").read_text(encoding="utf-8")
    assert gpt2rs.GPT2.from_pretrained(packed, config=text).config.n_embd == 64
    with pytest.raises(ValueError, match=r"own config has bos_token_id = 0, config has 50256"):
        gpt2rs.GPT2.from_pretrained(packed, config="gpt2")
    changed = json.loads(text) | {"layer_norm_epsilon": 0.5}
    (packed / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ValueError, match=r"layer_norm_epsilon = 1e-05, .*config\.json has 0\.5"):
        gpt2rs.GPT2.from_pretrained(packed)


def test_a_file_that_is_cut_short(packed: Path) -> None:
    path = packed / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"packed\.safetensors: the tensors take"):
        gpt2rs.GPT2.from_pretrained(packed)


def test_other_weights_are_never_hidden(packed: Path, plain: gpt2rs.GPT2) -> None:
    """A folder with model.safetensors is that model, so no packed one is written beside it."""
    plain.save_pretrained(packed)
    assert gpt2rs.GPT2.from_pretrained(packed).dtype == plain.dtype
    with pytest.raises(ValueError, match=r"has weights already \(model\.safetensors\)"):
        plain.save_packed(packed)


def test_saving_over_the_file_that_is_mapped(tmp_path: Path) -> None:
    gpt2rs.GPT2.from_config(LARGER, dtype="int8").save_packed(tmp_path)
    opened = gpt2rs.GPT2.from_pretrained(tmp_path)
    before = opened.logits([1, 9000])
    opened.save_packed(tmp_path)
    gpt2rs.GPT2.from_config(LARGER, dtype="int4", seed=3).save_packed(tmp_path)
    np.testing.assert_array_equal(opened.logits([1, 9000]), before)
    assert gpt2rs.GPT2.from_pretrained(tmp_path).dtype == "int4"


def limited() -> None:
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_no_room_leaves_what_was_there(packed: Path) -> None:
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    run = subprocess.run(
        [*COMMAND, "convert", str(CASES["plain"]), str(packed), "--dtype", "int4"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited,
    )
    assert run.returncode == 1
    assert "cannot save the model" in run.stderr
    assert str(packed) in run.stderr
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


class TestConvert:
    def test_what_it_writes_is_a_model(self, shakespeare: gpt2rs.GPT2, tmp_path: Path) -> None:
        out = str(tmp_path / "out")
        assert "int8 weights" in output("convert", "shakespeare", out, "--dtype", "int8")
        text = (
            gpt2rs.GPT2.from_pretrained("shakespeare", dtype="int8").generate("ROMEO:", max_new_tokens=9).text
        )
        shown = json.loads(output("generate", "--model", out, "--max-new-tokens", "9", "--json", "ROMEO:"))
        assert shown["text"] == text

    def test_info_says_what_it_is(self, packed: Path) -> None:
        shown = json.loads(output("info", str(packed), "--json"))
        model = gpt2rs.GPT2.from_pretrained(packed)
        assert (shown["kind"], shown["stored_dtype"]) == ("packed", "int8")
        assert shown["layout"].startswith("panels-")
        assert shown["memory_footprint"] == {"int8": model.memory_footprint()}
        page = output("info", str(packed))
        assert "packed, int8" in page
        assert shown["layout"] in page

    def test_mistakes(self, packed: Path, tmp_path: Path, plain: gpt2rs.GPT2) -> None:
        source = str(CASES["plain"])
        (tmp_path / "taken").write_text("here", encoding="utf-8")
        assert "taken" in error("convert", source, str(tmp_path / "taken"))
        assert (tmp_path / "taken").read_text(encoding="utf-8") == "here"
        plain.save_pretrained(tmp_path / "original")
        same = str(tmp_path / "original")
        assert "model.safetensors" in error("convert", same, same)
        assert "int7" in error("convert", source, str(tmp_path / "new"), "--dtype", "int7")
        assert "no-such" in error("convert", str(tmp_path / "no-such"), str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()
        assert "packed as int8" in error("convert", str(packed), str(tmp_path / "new"), "--dtype", "int4")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Where a file is mapped its bytes are counted once; where it is read, too."""
    config = {"vocab_size": 50_000, "n_positions": 8, "n_embd": 512, "n_layer": 1, "n_head": 8}
    gpt2rs.GPT2.from_config(config).save_packed(tmp_path)
    program = (
        "import resource, sys, gpt2rs\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = gpt2rs.GPT2.from_pretrained(sys.argv[1], n_threads=1)\n"
        "model.session().prefill([1])\n"
        "model.logits([1])\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)
    weights = (tmp_path / "packed.safetensors").stat().st_size
    assert int(run.stdout) < 1.15 * weights + 16e6
