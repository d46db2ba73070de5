"""`gpt2rs train` and `gpt2rs tokenizer train`, as a shell user sees them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpt2rs
from gpt2rs.train.log import read_log

COMMAND = [sys.executable, "-m", "gpt2rs"]
MODEL = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--n-ctx", "32", "--batch-size", "2"]
BASE = [*MODEL, "--tokenizer", "shakespeare", "--steps", "5", "--lr", "0.01", "--n-threads", "1", "--no-plot"]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def error(*arguments: Any) -> str:
    """What a run that fails says, in one line."""
    done = run(*arguments)
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_run_and_what_it_shows(text: Path, tmp_path: Path) -> None:
    done = run("train", "--data", text, "--out", tmp_path / "run", "--betas", "0.8,0.9", *BASE)
    assert (done.returncode, done.stderr) == (0, "")
    for shown in (
        "1 layers, 16 channels, 2 heads, 1024 tokens, 32 positions",
        "64 a step",
        "step 1  loss 6.9",
        "% of the FMA peak",
        "step 5  held-out loss",
        "step 5  sample:",
        "done after step 5",
    ):
        assert shown in done.stdout
    assert "betas = [0.8, 0.9]" in (tmp_path / "run" / "settings.toml").read_text()
    generated = run("generate", "--model", tmp_path / "run" / "last", "--max-new-tokens", "3", "my lord")
    assert (generated.returncode, generated.stderr) == (0, "")


def test_settings_in_a_file_give_the_same_run(text: Path, tmp_path: Path) -> None:
    assert run("train", "--data", text, "--out", tmp_path / "first", *BASE).returncode == 0
    again = run(
        "train", "--settings", tmp_path / "first" / "settings.toml", "--out", tmp_path / "second", "--no-plot"
    )
    assert again.returncode == 0
    weights = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_resume_and_fine_tune(text: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert run("train", "--data", text, "--out", first, *BASE).returncode == 0
    done = run("train", "--out", first, "--resume", "--steps", "7", "--no-plot")
    assert "going on after step 5" in done.stdout
    assert "done after step 7" in done.stdout
    tuned = run(
        "train",
        "--data",
        text,
        "--out",
        tmp_path / "second",
        "--init-from",
        first / "last",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--no-plot",
    )
    assert (tuned.returncode, tuned.stderr) == (0, "")
    assert "done after step 2" in tuned.stdout


def test_mistakes_are_one_line(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert error("train", "--data", tmp_path / "nowhere", "--out", out, *BASE).endswith("nowhere\n")
    assert "dropout is 1.5; it must be" in error(
        "train", "--data", text, "--out", out, "--dropout", "1.5", *BASE
    )
    assert "no run to go on with" in error("train", "--out", out, "--resume")
    assert "no tokenizer in" in error("train", "--data", text, "--out", out, *MODEL, "--tokenizer", tmp_path)
    heads = ["--n-head", "3"]
    assert "a divisor of n_embd (16)" in error("train", "--data", text, "--out", out, *BASE, *heads)
    assert not out.exists()
    assert run("train", "--data", text).returncode == 2
    assert run("train", "--out", out).returncode == 2


def test_a_run_is_not_overwritten(text: Path, tmp_path: Path) -> None:
    assert run("train", "--data", text, "--out", tmp_path / "run", *BASE).returncode == 0
    assert "has a run already; go on with it (--resume)" in error(
        "train", "--data", text, "--out", tmp_path / "run", *BASE
    )


def test_on_a_terminal_there_is_a_panel(text: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [*COMMAND, "train", "--data", str(text), "--out", str(tmp_path / "run"), *BASE]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    while True:
        try:
            data = os.read(controller, 65536)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not data:
            break
        shown += data
    assert process.wait(60) == 0
    screen = shown.decode()
    assert "tokenising [####" in screen
    assert "─ step 5 of 5 ─" in screen
    assert "held out, after step 5: held-out loss" in screen
    assert "after step 5 it writes:" in screen


class TestPlot:
    def test_shows_losses_and_samples(self, text: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from gpt2rs.train.plot import draw

        out = tmp_path / "run"
        run(
            "train", "--data", text, "--out", out, *BASE, "--eval-every", "2", "--sample-every", "2", "--plot"
        )
        svg = (out / "loss.svg").read_text()
        assert svg.startswith("<?xml")
        for step in (0, 2, 4, 5):
            assert f"after step {step}" in svg
        assert draw(out, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_takes_text_as_it_is(self, tmp_path: Path) -> None:
        """Dollars are no formulas, and control characters no drawing."""
        pytest.importorskip("matplotlib")
        from gpt2rs.train.plot import draw

        events = [
            {"event": "step", "step": 1, "loss": 3.0},
            {
                "event": "sampled",
                "step": 1,
                "prompt": "a",
                "text": "$x_{ \x07 \\frac <&> \N{CJK UNIFIED IDEOGRAPH-4E2D}\n" * 30,
            },
        ]
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
        assert draw(tmp_path).stat().st_size > 1000


class TestTokenizer:
    def test_is_byte_level_bpe_in_gpt2_s_files(self, text: Path, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        done = run("tokenizer", "train", "--data", text, "--out", tmp_path / "own", "--size", "300")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{tmp_path / 'own'}: 300 tokens, from {text.stat().st_size:,} bytes of text\n"
        vocab = json.loads((tmp_path / "own" / "vocab.json").read_text(encoding="utf-8"))
        assert sorted(vocab.values()) == list(range(300))
        assert vocab["<|endoftext|>"] == 299
        from gpt2rs.train.vocabulary import Vocabulary

        own = Vocabulary.named(str(tmp_path / "own"))
        mixed = text.read_text()[:500] + " naïve \N{SNOWMAN}\n\n  it's 42"
        assert own.encoding.decode(own.encoding.encode_ordinary(mixed)) == mixed
        # Fewer tokens than bytes, and those of Hugging Face's own program for the same files.
        theirs = tokenizers.ByteLevelBPETokenizer(
            str(tmp_path / "own" / "vocab.json"), str(tmp_path / "own" / "merges.txt")
        )
        ids = own.encoding.encode_ordinary(mixed)
        assert ids == theirs.encode(mixed).ids
        assert len(ids) < len(mixed.encode())

    def test_trains_a_model(self, text: Path, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        run("tokenizer", "train", "--data", text, "--out", tmp_path / "own", "--size", "280")
        done = run("train", "--data", text, "--out", tmp_path / "run", *BASE, "--tokenizer", tmp_path / "own")
        assert (done.returncode, done.stderr) == (0, "")
        model = gpt2rs.GPT2.from_pretrained(tmp_path / "run" / "last")
        assert (model.config.n_vocab, model.config.eos_token_ids) == (280, [279])
        assert model.generate("my lord", max_new_tokens=2).text
        assert any(entry["event"] == "sampled" for entry in read_log(tmp_path / "run" / "log.jsonl"))

    def test_mistakes(self, text: Path, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        train = ["tokenizer", "train", "--data", text, "--out", tmp_path / "own", "--size"]
        assert "size is 256; it must be at least 257" in error(*train, "256")
        assert run(*train, "260").returncode == 0
        assert "has a vocab.json already" in error(*train, "260")
        (tmp_path / "x.bin").write_bytes(b"ab")
        bins = ["tokenizer", "train", "--data", tmp_path / "x.bin", "--out", tmp_path / "other"]
        assert "a file of tokens, expected text" in error(*bins)
        (tmp_path / "empty.txt").touch()
        empty = ["tokenizer", "train", "--data", tmp_path / "empty.txt", "--out", tmp_path / "other"]
        assert f"no text in {tmp_path / 'empty.txt'}" in error(*empty)


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = "import gpt2rs, sys; print([name for name in sys.modules if 'train' in name or name == 'rich'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
