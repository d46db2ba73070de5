"""save_pretrained: what was saved loads again, and a save that fails leaves nothing behind."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import gpt2rs
from golden_cases import CASES, expected


@pytest.mark.parametrize("name", CASES)
def test_saved_models_load_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES[name])
    model.save_pretrained(tmp_path / "new" / "folder")
    again = gpt2rs.GPT2.from_pretrained(tmp_path / "new" / "folder")
    assert again.dtype == model.dtype
    assert json.loads(again.config.to_json()) == json.loads(model.config.to_json()) | {
        "torch_dtype": model.dtype
    }
    for ids in expected(name)["input_ids"]:
        np.testing.assert_array_equal(again.logits(ids), model.logits(ids))


def test_the_folder_is_one_that_transformers_reads(shakespeare: gpt2rs.GPT2, tmp_path: Path) -> None:
    shakespeare.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.ln_f.bias"} <= names
    assert "lm_head.weight" not in names
    again = gpt2rs.GPT2.from_pretrained(tmp_path)
    assert (
        again.generate("ROMEO:", max_new_tokens=8).text
        == shakespeare.generate("ROMEO:", max_new_tokens=8).text
    )


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are POSIX")
def test_files_are_for_whom_the_umask_says(tmp_path: Path, plain: gpt2rs.GPT2) -> None:
    before = os.umask(0o027)
    try:
        plain.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: stat.filemode(path.stat().st_mode) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors"), "-rw-r-----"
    )


def test_saving_over_the_folder_it_came_from(tmp_path: Path, plain: gpt2rs.GPT2) -> None:
    plain.save_pretrained(tmp_path)
    model = gpt2rs.GPT2.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(gpt2rs.GPT2.from_pretrained(tmp_path).logits([1, 2]), plain.logits([1, 2]))


def test_a_file_in_the_way(tmp_path: Path, plain: gpt2rs.GPT2) -> None:
    (tmp_path / "taken").write_text("here", encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot save the model.*taken"):
        plain.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "here"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are POSIX")
def test_no_room_leaves_what_was_there(tmp_path: Path, plain: gpt2rs.GPT2) -> None:
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    plain.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    program = (
        "import resource, sys, gpt2rs\n"
        "model = gpt2rs.GPT2.from_pretrained(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    model.save_pretrained(sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert "cannot save the model" in run.stdout
    assert str(tmp_path) in run.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
