"""The sampling kernel, on the host, against the CPU's sampler: the same logits and seed, the same token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from shim_models import needs_shim, odd, shim_machine

from gpt2rs import _core
from gpt2rs.cuda.machine import Launch
from gpt2rs.cuda.sampling import SETTINGS, on_device, settings

pytestmark = needs_shim

PAST = 12


def rows(n: int, v: int, seed: int) -> np.ndarray:
    """(n, V) logits of many kinds: normal, peaked, with ties, infinities, NaN and zeros of both signs."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.1, 9, (n, 1)), (n, v)).astype(np.float32)
    logits[1::4] = np.round(logits[1::4])
    logits[2::4] = np.where(rng.random((len(logits[2::4]), v)) < 0.3, -np.inf, np.round(logits[2::4] * 2) / 2)
    logits[3::8, ::7] = np.nan
    logits[3::8, 1::5] = -0.0
    logits[3::8, 2::5] = 0.0
    return logits


class Bench:
    """Rows of logits, one sampler each, through the kernel."""

    def __init__(self, n: int, v: int) -> None:
        self.machine = machine = shim_machine.ShimMachine(seed=v)
        self.n, self.v = n, v
        self.stride = -(-v // 4) * 4
        self.logits = machine.alloc(4 * n * self.stride)
        self.settings = machine.alloc(SETTINGS.itemsize * n)
        self.tokens, self.positions, self.steps = (machine.alloc(4 * n) for _ in range(3))
        self.history = machine.alloc(4 * n * (PAST + 4))
        self.mailbox = machine.mailbox(4 * 2 * n)

    def choose(self, logits: np.ndarray, samplers: list[_core.Sampler], pasts: list[list[int]]) -> list[int]:
        machine = self.machine
        history = np.zeros((self.n, PAST + 4), np.int32)
        history[:, :PAST] = pasts
        machine.upload(self.logits, np.pad(logits, ((0, 0), (0, self.stride - self.v)), constant_values=99.0))
        machine.upload(self.settings, settings(samplers, self.n))
        machine.upload(self.positions, np.full(self.n, PAST - 1, np.int32))
        machine.upload(self.steps, np.ones(self.n, np.int32))
        machine.upload(self.history, history)
        arguments = (
            *(self.logits, self.stride, self.v, self.settings, self.tokens, self.positions),
            *(self.history, PAST + 4, self.mailbox, 2, self.steps),
        )
        machine.launch(Launch("sample", (self.n, 1, 1), 512, 8 * (1024 + 40), arguments))
        found = self.mailbox.host.view(np.int32).reshape(2, self.n)[1].tolist()
        state = np.empty((4, self.n), np.int32)
        for row, buffer in zip(state, (self.tokens, self.positions, self.steps), strict=False):
            machine.download(buffer, row)
        assert state[0].tolist() == found
        assert state[1].tolist() == [-1 if token < 0 else PAST for token in found]
        assert state[2].tolist() == [2] * self.n
        machine.download(self.history, history)
        for row, token in zip(history, found, strict=True):
            assert token < 0 or row[PAST] == token
        return found


def draws(rng: np.random.Generator, v: int) -> dict[str, Any]:
    """Settings of one draw."""
    chosen: dict[str, Any] = {"do_sample": bool(rng.random() < 0.9), "seed": int(rng.integers(2**63))}
    chosen["index"] = int(rng.integers(3))
    if rng.random() < 0.6:
        chosen["temperature"] = float(rng.choice([1e-6, 0.1, 0.7, 1.0, 1.7, 50.0, 1e30]))
    if rng.random() < 0.5:
        chosen["top_k"] = int(rng.choice([0, 1, 2, 5, 40, v - 1, v]))
    if rng.random() < 0.5:
        chosen["top_p"] = float(rng.choice([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]))
    if rng.random() < 0.4:
        chosen["min_p"] = float(rng.choice([0.0, 0.02, 0.3, 1.0]))
    if rng.random() < 0.3:
        chosen["repetition_penalty"] = float(rng.choice([0.7, 1.3]))
    if rng.random() < 0.3:
        chosen["presence_penalty"] = float(rng.normal())
        chosen["frequency_penalty"] = float(rng.normal())
    return chosen


@pytest.mark.parametrize(
    ("v", "n", "rounds"), [(1, 4, 1), (2, 16, 2), (97, 32, 10), (1500, 32, 4), (50257, 4, 3)]
)
def test_the_cpus_tokens(v: int, n: int, rounds: int) -> None:
    rng = np.random.default_rng(v)
    bench = Bench(n, v)
    for _ in range(rounds):
        logits = rows(n, v, int(rng.integers(2**32)))
        samplers = [_core.Sampler(prompt_len=int(rng.integers(PAST + 2)), **draws(rng, v)) for _ in range(n)]
        pasts = rng.integers(0, min(v, 9), (n, PAST)).tolist()
        found = bench.choose(logits, samplers, pasts)
        for row, sampler, past, token in zip(logits, samplers, pasts, found, strict=True):
            try:
                want = sampler.choose(row, past).token
            except ValueError:
                want = -1
            assert token == want


def test_a_threshold_is_rounded_up() -> None:
    """Of three equal tokens two weigh 2/3; the least bit more takes the third."""
    bench = Bench(32, 3)
    for top_p in (2 / 3, np.nextafter(2 / 3, 1)):
        samplers = [_core.Sampler(prompt_len=0, do_sample=True, top_p=top_p, seed=seed) for seed in range(32)]
        found = bench.choose(np.zeros((32, 3), np.float32), samplers, [[0] * PAST] * 32)
        assert found == [sampler.choose(np.zeros(3, np.float32), [0] * PAST).token for sampler in samplers]
        assert (2 in found) == (top_p > 2 / 3)


def test_no_finite_score_is_a_token_of_its_own_and_an_error_of_the_models() -> None:
    bench = Bench(2, 50)
    logits = np.full((2, 50), -np.inf, np.float32)
    logits[1] = np.nan
    samplers = [_core.Sampler(prompt_len=0), _core.Sampler(prompt_len=0, do_sample=True)]
    assert bench.choose(logits, samplers, [[1] * PAST] * 2) == [-1, -1]


@pytest.mark.parametrize(
    "beyond",
    [
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.1},
        {"eta_cutoff": 0.1},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[1]]},
        {"suppress_tokens": [1]},
        {"logit_bias": {1: 2.0}},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"min_new_tokens": 4, "eos_token_ids": [0]},
    ],
)
def test_settings_that_the_kernel_has_not_go_by_the_host(beyond: dict[str, Any]) -> None:
    model = odd("float32")
    session = model.session()
    session.prefill([1, 2, 3])
    sampler = _core.Sampler(prompt_len=3, do_sample=True, seed=4, **beyond)
    assert not on_device(sampler, 3)
    samples = [model.decode([session], [sampler])[0] for _ in range(2)]
    for i, sample in enumerate(samples):
        past = session.tokens[: 3 + i]
        want = sampler.choose(model.logits(past)[-1], past)
        assert (sample.token, sample.logprob) == (want.token, want.logprob)
        assert list(sample.top_logprobs) == list(want.top_logprobs)
