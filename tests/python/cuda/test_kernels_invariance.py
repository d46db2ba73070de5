"""One answer: bits that do not depend on batch, pieces, forks, the kernels chosen or the order of threads."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from shim_models import ODD, config, needs_shim, odd, shim_machine

import gpt2rs
from gpt2rs import _core
from gpt2rs.cuda import kv_cache, plan, steps
from gpt2rs.cuda.model import CudaModel

pytestmark = needs_shim

HELD: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "precision": "fast"},
    {"dtype": "float32"},
    {"dtype": "float32", "kv_dtype": "bfloat16"},
]
LENGTH = 270
TOKENS = np.random.default_rng(1).integers(0, 90, LENGTH).tolist()


@pytest.fixture(scope="module", params=HELD, ids=lambda held: "-".join(held.values()))
def model(request: pytest.FixtureRequest) -> CudaModel:
    return odd(**request.param)


@pytest.fixture(scope="module")
def rows(model: CudaModel) -> np.ndarray:
    """(T, V): the prompt's kernels on the whole sequence."""
    return model.logits(TOKENS)


def greedy(prompt_len: int = 0, **settings: Any) -> _core.Sampler:
    return _core.Sampler(prompt_len=prompt_len, **settings)


def test_pieces(model: CudaModel, rows: np.ndarray) -> None:
    session = model.session()
    for start, end in pairwise((0, 1, 3, 20, 130, 131, 260, LENGTH)):
        session.prefill(TOKENS[start:end])
        np.testing.assert_array_equal(session.logits, rows[end - 1])


def test_batches_by_decoding(model: CudaModel, rows: np.ndarray) -> None:
    """Sequences of many lengths in one batch, in buckets of several sizes: the decoding kernels."""
    ends = [1, 129, 270, 32, 2, 65, 17, 200, 5, 260, 96]
    sessions = [model.session() for _ in ends]
    model.prefill(sessions, [TOKENS[:end] for end in ends])
    for count in (1, 3, 5, 11):
        got = model.last_logits(sessions[:count])
        np.testing.assert_array_equal(got, rows[[end - 1 for end in ends[:count]]])


def test_more_sequences_than_a_graph_has_rows() -> None:
    """70 at once are 64 and 6: prompts, steps of several tokens, and logits are those of each alone."""
    model = odd(dtype="bfloat16")
    count = steps.MAX_BATCH + 6
    prompts = [[i, 89 - i] for i in range(count)]
    sessions = [model.session() for _ in range(count)]
    model.prefill(sessions, prompts)
    tokens = [model.decode(sessions, [greedy(2)] * count) for _ in range(2)]
    logits = model.last_logits(sessions)
    for i in (0, 63, 64, 69):
        alone = model.session()
        alone.prefill(prompts[i])
        for step in tokens:
            [sample] = model.decode([alone], [greedy(2)])
            assert sample.token == step[i].token
        np.testing.assert_array_equal(alone.logits, logits[i])


def test_products_cut_in_many() -> None:
    """An inner size whose product's K is cut in as many as any is."""
    model = CudaModel.random(
        shim_machine.ShimMachine(), config({**ODD, "n_layer": 1, "n_inner": 1600}), seed=2, dtype="bfloat16"
    )
    assert model._weights.blocks[0].mlp_c_proj.weight.splits == 4
    want = model.logits(TOKENS[:20])
    sessions = [model.session() for _ in range(3)]
    model.prefill(sessions, [TOKENS[:1], TOKENS[:20], TOKENS[:7]])
    np.testing.assert_array_equal(model.last_logits(sessions), want[[0, 19, 6]])


def test_a_prompt_in_a_batch(model: CudaModel, rows: np.ndarray) -> None:
    other = [7] * 21
    sessions = [model.session() for _ in range(3)]
    model.prefill(sessions, [other, TOKENS[:150], other])
    np.testing.assert_array_equal(sessions[1].logits, rows[149])
    np.testing.assert_array_equal(sessions[0].logits, sessions[2].logits)


def test_forks_and_cuts(model: CudaModel, rows: np.ndarray) -> None:
    whole = model.session()
    whole.prefill(TOKENS[:140])
    fork = whole.fork()
    fork.truncate(70)
    fork.prefill([3] * 30)
    wanted = fork.logits
    # What a fork wrote, the others don't see: not where blocks were full, nor in the one that was cut.
    whole.prefill(TOKENS[140:145])
    np.testing.assert_array_equal(whole.logits, rows[144])
    again = fork.fork()
    again.truncate(70)
    again.prefill(TOKENS[70:100])
    np.testing.assert_array_equal(again.logits, rows[99])
    fork.prefill([5])
    fork.truncate(100)
    np.testing.assert_array_equal(fork.logits, wanted)
    whole.truncate(33)
    np.testing.assert_array_equal(whole.logits, rows[32])


@pytest.mark.parametrize("held", [HELD[0], HELD[2]], ids=lambda held: held["dtype"])
def test_order_of_threads(held: dict[str, Any]) -> None:
    one, other = odd(**held), odd(**held, seed=12345)
    np.testing.assert_array_equal(one.logits(TOKENS[:40]), other.logits(TOKENS[:40]))


def test_a_norm_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows too long for a product to normalise take another launch, and give the same bits."""
    fused = odd("bfloat16")
    session = fused.session()
    session.prefill(TOKENS[:9])
    want = session.logits
    monkeypatch.setattr(plan, "_FUSED_C", 0)
    apart = odd("bfloat16")
    other = apart.session()
    other.prefill(TOKENS[:9])
    np.testing.assert_array_equal(other.logits, want)
    assert "norm_matmul_3" in fused.machine.kernels
    assert "norm_matmul_3" not in apart.machine.kernels


def test_steps_ahead(model: CudaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps without the host give what one at a time does, past the end of a block and of a run."""
    prompts = [TOKENS[:125], TOKENS[:1]]

    def texts() -> list[list[int]]:
        sessions = [model.session() for _ in prompts]
        model.prefill(sessions, prompts)
        samplers = [greedy(len(prompt), repetition_penalty=1.3, seed=3, do_sample=True) for prompt in prompts]
        for _ in range(6):
            model.decode(sessions, samplers)
        return [session.tokens for session in sessions]

    ahead = texts()
    monkeypatch.setattr(steps, "MAX_STEPS", 1)
    model._steps.clear()
    assert texts() == ahead
    model._steps.clear()


def test_what_was_computed_ahead_is_dropped_when_a_sequence_changes() -> None:
    model = odd("bfloat16")
    session = model.session()
    session.prefill(TOKENS[:10])
    sampler = greedy(10)
    for _ in range(4):
        model.decode([session], [sampler])
    fork = session.fork()
    fork.prefill([5])
    session.truncate(12)
    session.prefill([8, 9])
    model.decode([session], [sampler])
    for changed in (session, fork):
        np.testing.assert_array_equal(changed.logits, model.logits(changed.tokens)[-1])


def test_an_interrupted_step_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may leave while the device goes on: what is asked for next is not from further on."""
    model = odd("bfloat16")
    whole, cut = model.session(), model.session()
    for session in (whole, cut):
        session.prefill(TOKENS[:30])
    sampler = greedy(30)
    for _ in range(9):
        model.decode([whole], [sampler])
    for decoded in range(5):

        def interrupted() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(model.machine, "synchronize", interrupted)
            model.decode([cut], [sampler])
        while cut.pos < 30 + 2 * (decoded + 1) - 1:
            model.decode([cut], [sampler])
    assert cut.tokens == whole.tokens[: cut.pos] and cut.pos == 39


@pytest.mark.parametrize("what", ["prefill", "last_logits", "decode"])
def test_refused_memory_harms_no_sequence(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Wherever among the blocks and copies of a batch memory ends, its sequences share what they shared."""
    monkeypatch.setattr(kv_cache, "_SLAB_BYTES", 1)
    model = odd("float32")
    pool = model._pool
    base = model.session()
    base.prefill(TOKENS[:40])
    wanted = base.logits
    model.last_logits([base, base.fork()])
    refusals = 0
    while True:
        forks = [base.fork(), base.fork()]
        pool._collect()
        pool._free.clear()
        n_slabs, left = len(pool._slabs), refusals
        owners = [block.owners for block in base.cache.blocks]
        granted = model.machine.alloc

        def alloc(n_bytes: int, granted: Any = granted) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise RuntimeError("out of memory")
            return granted(n_bytes)

        refused = False
        with monkeypatch.context() as patched:
            patched.setattr(model.machine, "alloc", alloc)
            try:
                if what == "prefill":
                    model.prefill(forks, [[3] * 40, [5] * 40])
                elif what == "decode":
                    model.decode(forks, [greedy(40), greedy(40)])
                else:
                    model.last_logits(forks)
            except RuntimeError as error:
                assert str(error) == "out of memory"
                refused = True
        if refused:
            assert [fork.pos for fork in forks] == [40, 40]
            assert [block.owners for block in base.cache.blocks] == owners
            # What was taken in vain is there to be taken.
            assert len(pool._free) == len(pool._slabs) - n_slabs
            model.prefill(forks, [[3] * 40, [5] * 40])
        elif what != "prefill":
            model.prefill(forks, [[3] * 40, [5] * 40])
        np.testing.assert_array_equal(base.logits, wanted)
        for fork in forks:
            np.testing.assert_array_equal(fork.logits, model.logits(fork.tokens)[-1])
        if not refused:
            break
        refusals += 1
    assert refusals >= 3


def test_random_weights_are_those_of_the_cpu() -> None:
    model = odd("float32")
    cpu = gpt2rs.GPT2.from_config(ODD, seed=5)
    want = cpu.logits(TOKENS[:50])
    assert np.abs(model.logits(TOKENS[:50]) - want).max() < 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(model.score(TOKENS[:50]), cpu._core.score(TOKENS[:50]), atol=1e-5)
