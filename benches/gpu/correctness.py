"""Is what a GPU computes right, and one answer?  A check gives what its row says, or raises `Wrong`
or `NotRun`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# Bounds and reference checkpoints are those of the tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "python"))
import error_bounds
import gpt2rs
from golden_cases import CASES, expected, generations
from gpt2rs.cuda import compiler
from gpt2rs.cuda.availability import device as find_device
from gpt2rs.cuda.gpu import Gpu
from gpt2rs.cuda.machine import Launch

# Prompts of a batch: each so many tokens longer than the one before, up to a number where it begins anew.
PROMPTS = (37, 200)


class Wrong(AssertionError):
    """A check that failed, and how."""


class NotRun(Exception):
    """A check that can't be made here, and why."""


def golden(device: str, names: Sequence[str] | None = None) -> str:
    """Logits of the reference checkpoints, or those named, against transformers in float64 and against the
    CPU, by the bounds that the tests hold the kernels to on the host; and texts."""
    chosen = list(CASES) if names is None else names
    worst = {"transformers": 0.0, "the CPU": 0.0}
    n_texts = 0
    for name in chosen:
        want, runs = expected(name), generations(name)
        for dtype in ("float32", "bfloat16"):
            model, cpu = (
                gpt2rs.GPT2.from_pretrained(CASES[name], dtype=dtype, device=where)
                for where in (device, "cpu")
            )
            for ids, exact in zip(want["input_ids"], want["logits"], strict=True):
                found, scale = model.logits(ids), float(np.abs(exact).max())
                bounds = {
                    "transformers": error_bounds.cuda(model._core, scale, rounded=dtype == "bfloat16"),
                    "the CPU": error_bounds.apart(model._core, scale),
                }
                for whose, other in (("transformers", exact), ("the CPU", cpu.logits(ids))):
                    error = float(np.abs(found - other).max())
                    worst[whose] = max(worst[whose], error / bounds[whose])
                    if not error <= bounds[whose]:
                        told = f"{error:.3g} from {whose}, {bounds[whose]:.3g} at most"
                        raise Wrong(f"{name}, {dtype}: logits are {told}")
            # What transformers wrote; in bfloat16, what the CPU writes, where nothing is drawn.
            texts = [(run, run["tokens"]) for run in runs]
            if dtype == "bfloat16":
                texts = [(run, cpu.generate(run["prompt"], **run["kwargs"]).tokens) for run in runs[:1]]
            for run, text in texts:
                written = model.generate(run["prompt"], **run["kwargs"]).tokens
                if written != text:
                    raise Wrong(f"{name}, {dtype}, {run['name']}: {written} instead of {text}")
            n_texts += len(texts)
    shares = " and ".join(f"{100 * share:.0f} % of the bound from {whose}" for whose, share in worst.items())
    return f"{len(chosen)} checkpoints in float32 and bfloat16, up to {shares}; {n_texts} texts are the same"


def batch_invariance(model: gpt2rs.GPT2, n_sequences: int) -> str:
    """A sequence's logits and text alone, in a batch, and with its prompt cut into pieces: equal bits."""
    step, longest = PROMPTS
    lengths = [1 + step * i % longest for i in range(n_sequences)]
    prompts = [tokens(model, n, seed=i) for i, n in enumerate(lengths)]
    together = [model.session() for _ in prompts]
    model._core.prefill([session._core for session in together], prompts)
    # Each sequence's last token, by one step of decoding for all.
    rows = model._core.last_logits([session._core for session in together])  # type: ignore[attr-defined]
    texts = model.generate(prompts, max_new_tokens=8, eos_token_id=None)
    for i, (prompt, row, text) in enumerate(zip(prompts, rows, texts, strict=True)):
        alone, pieces = model.session(), model.session()
        alone.prefill(prompt)
        for start in range(0, len(prompt), 13):
            pieces.prefill(prompt[start : start + 13])
        for name, other in (("in a batch", row), ("in pieces", pieces.logits)):
            if not same_bits(alone.logits, other):
                raise Wrong(f"sequence {i} of {len(prompt)} tokens: other logits alone and {name}")
        if i < 4 and model.generate(prompt, max_new_tokens=8, eos_token_id=None).tokens != text.tokens:
            raise Wrong(f"sequence {i}: another text alone than in a batch")
    return (
        f"{n_sequences} sequences of 1 to {max(lengths)} tokens: the same bits alone, together and in pieces"
    )


def mma_invariance(device: str, n_trials: int = 4096, n_steps: int = 16) -> str:
    """One column in each of the eight places of an MMA, and one row in each of the sixteen: the same bits."""
    gpu = places_gpu(device)
    rng = np.random.default_rng(0)
    # Words a step: of the matrix that stays, of the column or row, and of what stands around it.
    for kernel, words, n_places, n_sums in (("columns", (128, 8, 64), 8, 16), ("rows", (64, 8, 128), 16, 8)):
        arrays = [bfloat16_words(rng, n_trials * n_steps * n) for n in words]
        buffers = [gpu.alloc(array.nbytes) for array in arrays]
        for buffer, array in zip(buffers, arrays, strict=True):
            gpu.upload(buffer, array)
        sums = np.empty((n_trials, n_places, n_sums), np.float32)
        out = gpu.alloc(sums.nbytes)
        gpu.launch(Launch(kernel, (n_trials, 1, 1), 32, 0, (*buffers, out, n_steps)))
        gpu.download(out, sums)
        if not np.isfinite(sums).all() or len(np.unique(sums[:, 0])) < n_trials:
            raise Wrong(f"{kernel}: the sums are not those of random numbers")
        for place in range(1, n_places):
            if not same_bits(sums[:, 0], sums[:, place]):
                raise Wrong(f"{gpu.name}: {kernel} have other bits in place {place} than in place 0")
    chains = f"{n_trials} chains of {n_steps} mma.m16n8k16 on {gpu.arch}"
    return f"{chains}: columns and rows have the same bits in all places"


def mma_errors(device: str, n_trials: int = 1024, n_steps: int = 32) -> str:
    """What chains of MMA are off by, of random numbers and of the worst: sums beside which all products are
    lost.  The bounds rest on what is known of the architectures that there are; a new one is seen here."""
    gpu = places_gpu(device)
    rng = np.random.default_rng(0)
    shapes = (n_trials, n_steps, 16, 16), (n_trials, n_steps, 16)
    numbers = {
        "random": tuple(bfloat16_values(bfloat16_words(rng, int(np.prod(s)) // 2)).reshape(s) for s in shapes)
    }
    for power in (-23, -24, -25):
        a, column = np.full(shapes[0], 2.0 ** (power + 12)), np.full(shapes[1], (1 - 2.0**-8) * 2.0**-12)
        a[:, 0, :, 0] = column[:, 0, 0] = 1
        numbers[f"below 2^{power} beside 1"] = a, column
    said = []
    for kind, (a, column) in numbers.items():
        # As lanes hold it: row 8 h + g, k 8 i + 2 t + e is half e of word 2 i + h of lane 4 g + t.
        lanes = a.reshape(n_trials, n_steps, 2, 8, 2, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
        words = [bfloat16_bits(np.ascontiguousarray(part)) for part in (lanes, column)]
        words.append(np.zeros(n_trials * n_steps * 64, np.uint32))
        buffers = [gpu.alloc(array.nbytes) for array in words]
        for buffer, array in zip(buffers, words, strict=True):
            gpu.upload(buffer, array)
        sums = np.empty((n_trials, 8, 16), np.float32)
        out = gpu.alloc(sums.nbytes)
        gpu.launch(Launch("columns", (n_trials, 1, 1), 32, 0, (*buffers, out, n_steps)))
        gpu.download(out, sums)
        exact, size = (
            np.einsum("nsrk,nsk->nr", *each) for each in ((a, column), (np.abs(a), np.abs(column)))
        )
        worst = (np.abs(sums[:, 0] - exact) / size).max() / error_bounds.grown(error_bounds.MMA * n_steps)
        if not worst <= 1:
            raise Wrong(
                f"{gpu.arch}: sums of {n_steps} mma, {kind}, are off by {worst:.3g} times their bound"
            )
        said.append(f"{kind} {100 * worst:.0f} %")
    return f"chains of {n_steps} mma.m16n8k16 on {gpu.arch}, of their bound: {', '.join(said)}"


def places_gpu(device: str) -> Gpu:
    """The GPU, with the kernels of places.cu."""
    which = find_device(int(device.partition(":")[2] or 0))
    arch = compiler.architecture(which.major, which.minor)
    return Gpu(which, arch, compiler.build([places_source()], arch))


def places_source() -> compiler.Source:
    """The kernels beside this file, with the package's primitives."""
    text = Path(__file__).with_name("places.cu").read_text(encoding="utf-8")
    return compiler.Source("places.cu", text, compiler.package_sources()[0].headers)


def bfloat16_words(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n,) uint32, two bfloat16 each, of sizes from 2^-12 to 2^12: sums round at every step."""
    values = rng.standard_normal(2 * n, np.float32) * np.exp2(rng.integers(-12, 13, 2 * n)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)


def bfloat16_values(words: np.ndarray) -> np.ndarray:
    """(2 n,) float64 of n words, the low half first."""
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The words of values that bfloat16 holds."""
    return (values.astype(np.float32).reshape(-1).view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)


TINY = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 512, "n_positions": 128}
_TINY_RUN = """
    import gpt2rs
    for dtype in ("float32", "bfloat16"):
        model = gpt2rs.GPT2.from_config({config}, dtype=dtype, device={device!r})
        prompts = [list(range(1, 2 + 9 * i)) for i in range(5)]
        model.generate(prompts, max_new_tokens=6, eos_token_id=None)
        model.generate(prompts, max_new_tokens=6, eos_token_id=None, temperature=0.8, top_p=0.9, seed=1)
        model.score(prompts[-1])
"""


def sanitizer(tool: str, device: str) -> str:
    """NVIDIA's compute-sanitizer over a tiny model: "memcheck" finds bad accesses, "racecheck" shared-memory
    races."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise NotRun("there is no compute-sanitizer")
    code = textwrap.dedent(_TINY_RUN).format(config=TINY, device=device)
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "86", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 86:
        raise Wrong(f"{tool}: {last}")
    if done.returncode:
        raise NotRun((done.stderr.strip().splitlines() or [last])[-1])
    return last.strip("= ")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays are equal, the sign of zero and NaNs included."""
    return bool((np.ascontiguousarray(a).view(np.uint32) == np.ascontiguousarray(b).view(np.uint32)).all())


def tokens(model: gpt2rs.GPT2, n: int, seed: int = 0) -> list[int]:
    """n ids spread over the vocabulary."""
    return [(seed * 31 + 7919 * i) % model.config.n_vocab for i in range(n)]


def checked(checks: dict[str, Callable[[], str]]) -> list[tuple[str, bool | None, str]]:
    """Each check's name, whether it held (None: it was not run), and what it says."""
    rows: list[tuple[str, bool | None, str]] = []
    for name, check in checks.items():
        try:
            rows.append((name, True, check()))
        except NotRun as reason:
            rows.append((name, None, str(reason)))
        except (Wrong, RuntimeError, subprocess.TimeoutExpired) as error:
            rows.append((name, False, str(error)))
    return rows
