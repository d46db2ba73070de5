"""`benches/gpu`, run from beginning to end over the fake driver, with kernels that compute on the host.

Times are made up there (a millisecond a kernel); what is measured, printed and written is not.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shim_driver
from fake_driver import Gpu
from resources import ARCHS
from shim_driver import ShimDriver
from shim_models import needs_shim, shim_machine
from test_kernels_compile import needs_nvrtc

import error_bounds
from gpt2rs.cuda import compiler
from gpt2rs.cuda import gpu as cuda_gpu
from gpt2rs.cuda.availability import Device
from gpt2rs.cuda.machine import Launch

sys.path.insert(0, str(Path(__file__).parents[3] / "benches" / "gpu"))
import correctness
import report
import run
import timing

TINY = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 128}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ShimDriver]:
    monkeypatch.setenv("GPT2RS_CACHE_DIR", str(tmp_path))
    with shim_driver.installed(monkeypatch) as made:
        # So that copies are of few bytes.
        made.gpus = [Gpu(n_bytes=50_000_000)]
        yield made


def options(*arguments: str) -> Any:
    return run.parse([*arguments, "--rounds", "2", "--steps", "16", "--batches", "1,3", "--contexts", "8,40"])


@needs_shim
def test_a_run_measures_all_of_it(
    driver: ShimDriver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    asked = options("--sizes", "124M,355M", "--parts", "decode,prefill,launch", "--json", str(out))
    assert run.Run(asked, {"124M": TINY, "355M": TINY}).go() == 0
    printed = capsys.readouterr().out
    for heading in ("# NVIDIA H200, 132, sm_90, CUDA 13.0", "## A graph of", "## Decoding", "## Prompts"):
        assert heading in printed
    facts = json.loads(out.read_text())
    assert facts["machine"]["gpu"] == "NVIDIA H200"
    assert facts["options"]["batches"] == [1, 3]
    decoded = [
        (figure["model"], figure["context"], figure["batch"], len(figure["seconds"]))
        for figure in facts["figures"]
        if figure["work"] == "decode"
    ]
    assert [row for row in decoded if "apart" not in row[0]] == [
        (size, context, batch, 2) for size in ("124M", "355M") for context in (8, 40) for batch in (1, 3)
    ]
    assert [row for row in decoded if "apart" in row[0]] == [
        ("124M, launches apart", 8, 1, 2),
        ("355M, launches apart", 8, 1, 2),
    ]
    assert [figure["context"] for figure in facts["figures"] if figure["work"] == "prefill"] == [128, 128]
    # A kernel is a millisecond here; a step has 5 for each layer, the embedding, the head and the choice.
    [step] = {
        round(second * 1e3)
        for figure in facts["figures"]
        if figure["work"] == "decode" and figure["batch"] == 1
        for second in figure["seconds"]
    }
    assert step == 13


@needs_shim
def test_launches_apart_are_apart(driver: ShimDriver) -> None:
    asked = options("--sizes", "124M", "--parts", "decode")
    bench = run.Run(asked, {"124M": TINY})
    model = bench.model("124M")
    bench._decode(model, "124M")
    driver.overlapping.clear()
    timing.gpu_of(model).overlap = False
    model._core._steps.clear()
    model.generate([1, 2], max_new_tokens=2)
    assert driver.overlapping == []


@needs_shim
class TestCorrectness:
    def test_of_golden_cases_is_told(self, driver: ShimDriver) -> None:
        said = correctness.golden("cuda:0", ["plain"])
        assert said.startswith("1 checkpoints in float32 and bfloat16, up to ")
        assert said.endswith(" texts are the same")

    def test_of_wrong_logits_is_an_error(self, driver: ShimDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        import gpt2rs

        right = gpt2rs.GPT2.logits
        monkeypatch.setattr(gpt2rs.GPT2, "logits", lambda self, ids: right(self, ids) * np.float32(1.001))
        with pytest.raises(correctness.Wrong, match=r"plain, float32: logits are .* from transformers"):
            correctness.golden("cuda:0", ["plain"])

    def test_of_batches_compares_bits(self, driver: ShimDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        model = run.Run(options(), {"124M": TINY}).model("124M")
        monkeypatch.setattr(correctness, "PROMPTS", (17, 30))
        assert correctness.batch_invariance(model, 2).startswith("2 sequences of 1 to ")
        calls = []

        def once_different(a: np.ndarray, b: np.ndarray) -> bool:
            calls.append(1)
            return len(calls) < 3

        monkeypatch.setattr(correctness, "same_bits", once_different)
        with pytest.raises(correctness.Wrong, match="other logits alone and in a batch"):
            correctness.batch_invariance(model, 2)

    def test_of_places_is_that_of_the_shim(self, driver: ShimDriver) -> None:
        said = correctness.mma_invariance("cuda:0", n_trials=3, n_steps=4)
        assert said == (
            "3 chains of 4 mma.m16n8k16 on sm_90: columns and rows have the same bits in all places"
        )

    @pytest.mark.parametrize(("kernel", "shape"), [("columns", (3, 8, 16)), ("rows", (3, 16, 8))])
    def test_of_places_sees_a_difference(
        self, driver: ShimDriver, kernel: str, shape: tuple[int, ...]
    ) -> None:
        """Of one bit, of one sum, in one of the places."""
        right = driver.kernels[kernel].run

        def run_and_flip(grid: Any, block: int, smem: int, *args: bytes) -> None:
            right(grid, block, smem, *args)
            sums = driver.view(int.from_bytes(args[3], "little"), 3 * 8 * 16, np.uint32)
            sums.reshape(shape)[1, 5, 7] ^= 1

        driver.kernels[kernel].run = run_and_flip
        with pytest.raises(correctness.Wrong, match=f"{kernel} have other bits in place 5 than in place 0"):
            correctness.mma_invariance("cuda:0", n_trials=3, n_steps=4)

    @pytest.mark.parametrize(
        ("arch", "lost"), [("sm_80", "79 %, .* 79 %, .* 40 %"), ("sm_90", "39 %, .* 40 %, .* 40 %")]
    )
    def test_of_errors_of_an_mma_tells_how_it_adds(self, driver: ShimDriver, arch: str, lost: str) -> None:
        driver.adds = shim_machine.TENSOR_CORES[arch]
        said = correctness.mma_errors("cuda:0", n_trials=2, n_steps=16)
        assert re.fullmatch(
            rf"chains of 16 mma.m16n8k16 on sm_90, of their bound: random \d %, .* {lost}", said
        )

    def test_of_errors_of_an_mma_sees_more_than_is_known_of_any(self, driver: ShimDriver) -> None:
        driver.adds = 16, 23
        with pytest.raises(correctness.Wrong, match=r"sums of 16 mma, .* are off by 1.59 times their bound"):
            correctness.mma_errors("cuda:0", n_trials=2, n_steps=16)

    def test_of_places_puts_what_it_means_to_where_it_means_to(self, driver: ShimDriver) -> None:
        """The sums are those of the column, by float64 loops over what was uploaded."""
        rng = np.random.default_rng(3)
        a, column, others = (correctness.bfloat16_words(rng, 2 * n) for n in (128, 8, 64))
        got = places(driver, "columns", (a, column, others), (1, 8, 16))
        matrix = np.zeros((2, 16, 16))
        for step, lane, word, half in np.ndindex(2, 32, 4, 2):
            row, k = lane // 4 + 8 * (word % 2), 2 * (lane % 4) + half + 8 * (word // 2)
            matrix[step, row, k] = values_of(a)[((step * 32 + lane) * 4 + word) * 2 + half]
        vector = values_of(column).reshape(2, 16)
        want = np.einsum("srk,sk->r", matrix, vector)
        size = np.einsum("srk,sk->r", np.abs(matrix), np.abs(vector))
        assert (np.abs(got[0] - want) <= error_bounds.grown(2 * error_bounds.MMA) * size).all()


def values_of(words: np.ndarray) -> np.ndarray:
    """The bfloat16 values of words, the low half first."""
    return correctness.bfloat16_values(words)


def places(driver: ShimDriver, kernel: str, arrays: Any, shape: tuple[int, ...]) -> np.ndarray:
    """One launch of a kernel of places.cu, of two steps."""
    driver.cuInit(0)
    device = Device(0, "a GPU", 9, 0, 10**9)
    gpu = cuda_gpu.Gpu(device, "sm_90", compiler.build([correctness.places_source()], "sm_90"))
    buffers = [gpu.alloc(array.nbytes) for array in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        gpu.upload(buffer, array)
    sums = np.empty(shape, np.float32)
    out = gpu.alloc(sums.nbytes)
    gpu.launch(Launch(kernel, (shape[0], 1, 1), 32, 0, (*buffers, out, 2)))
    gpu.download(out, sums)
    return sums


class TestSanitizer:
    def program(self, folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        path = folder / "compute-sanitizer"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")

    def test_that_is_missing_is_not_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(correctness.NotRun, match="there is no compute-sanitizer"):
            correctness.sanitizer("memcheck", "cuda")

    def test_that_finds_nothing_says_so(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        script = 'echo "$@" > ' + str(tmp_path / "given") + '\necho "========= ERROR SUMMARY: 0 errors"'
        self.program(tmp_path, monkeypatch, script)
        assert correctness.sanitizer("racecheck", "cuda:1") == "ERROR SUMMARY: 0 errors"
        given = (tmp_path / "given").read_text()
        assert given.startswith("--tool racecheck --error-exitcode 86 ")
        compile(given[given.index("import gpt2rs") :], "what it runs", "exec")
        assert "device='cuda:1'" in given

    def test_that_finds_something_is_an_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.program(tmp_path, monkeypatch, 'echo "========= ERROR SUMMARY: 3 errors"; exit 86')
        with pytest.raises(correctness.Wrong, match="memcheck: ========= ERROR SUMMARY: 3 errors"):
            correctness.sanitizer("memcheck", "cuda")

    def test_that_can_t_run_here_says_why(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.program(tmp_path, monkeypatch, "echo 'Device not supported' >&2; exit 1")
        with pytest.raises(correctness.NotRun, match="Device not supported"):
            correctness.sanitizer("memcheck", "cuda")


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_the_kernels_of_places_compile(arch: str) -> None:
    assert compiler.compile_source(correctness.places_source(), arch).log == ""


def test_checks_that_fail_are_rows_and_the_status() -> None:
    def wrong() -> str:
        raise correctness.Wrong("off by one")

    def failing() -> str:
        raise RuntimeError("a kernel failed")

    def absent() -> str:
        raise correctness.NotRun("there is no such tool")

    assert correctness.checked({"a": lambda: "fine", "b": wrong, "c": failing, "d": absent}) == [
        ("a", True, "fine"),
        ("b", False, "off by one"),
        ("c", False, "a kernel failed"),
        ("d", None, "there is no such tool"),
    ]


def test_random_words_are_finite_bfloat16_of_many_sizes() -> None:
    words = correctness.bfloat16_words(np.random.default_rng(1), 5000)
    values = (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 1000
    assert np.abs(values).min() < 1e-3


class TestArguments:
    def test_have_defaults(self) -> None:
        asked = run.parse([])
        assert asked.sizes == ("124M", "355M", "774M", "1558M")
        assert (asked.batches, asked.contexts) == ((1, 8, 64), (32, 896))
        assert asked.parts == run.PARTS

    @pytest.mark.parametrize(
        "arguments",
        [("--sizes", "1B"), ("--batches", "0"), ("--contexts", "x"), ("--parts", "all"), ("--rounds", "-1")],
    )
    def test_that_mean_nothing_are_refused(
        self, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as raised:
            run.parse(list(arguments))
        assert raised.value.code == 2
        assert f"argument {arguments[0]}" in capsys.readouterr().err


class TestReport:
    def test_is_markdown(self) -> None:
        text = report.table(("what", "us"), [("a", "1.0"), ("b", "2.0")])
        assert text == "| what | us |\n| --- | ---: |\n| a | 1.0 |\n| b | 2.0 |"

    def test_shows_medians_and_their_ends(self) -> None:
        assert report.spread([3e-6, 1e-6, 2e-6], 1, 1e-6) == "2.0 (1.0, 3.0)"

    def test_takes_ratios_round_by_round(self) -> None:
        assert report.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == "3.00 (2.00, 4.00)"

    def test_figures_tell_their_share_of_a_bandwidth(self) -> None:
        figure = timing.Figure("124M", "decode", 32, 8, (3e-4, 1e-4, 2e-4), n_bytes=4e8)
        assert figure.microseconds == pytest.approx(200)
        assert figure.share(4000) == pytest.approx(0.5)
