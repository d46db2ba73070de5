"""The loss of a batch and its gradients, and the core's trainer as Python sees it."""

from __future__ import annotations

import numpy as np
import pytest

import gpt2rs
from golden_cases import CASES, GOLDEN
from gpt2rs import _core
from gpt2rs.train.gradients import loss_and_grads

TRAINING = ("training_plain", "training_odd")


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    folder = GOLDEN / "cases" / name
    expected = np.load(folder / "expected.npz")
    inputs, targets = expected["batches"][0]
    model = gpt2rs.GPT2.from_pretrained(folder, dtype="float32")
    loss, grads = loss_and_grads(model, inputs, targets)
    assert loss == pytest.approx(expected["losses"][0], rel=1e-6)
    names = {
        key.removeprefix("grad.").removeprefix("transformer.") for key in expected if key.startswith("grad.")
    }
    assert set(grads) == names
    for key, found in grads.items():
        prefix = "" if key == "lm_head.weight" else "transformer."
        wanted = expected[f"grad.{prefix}{key}"]
        assert found.dtype == np.float32 and found.shape == wanted.shape
        # The bound that tests/train derives for these cases.
        assert np.abs(found - wanted).max() <= 4e-4 * np.abs(wanted).max(), key


def test_bfloat16_weights_are_widened() -> None:
    batch = np.arange(18).reshape(2, 9)
    both = [gpt2rs.GPT2.from_pretrained(CASES["bfloat16"], dtype=dtype) for dtype in ("float32", "bfloat16")]
    (loss, grads), (other_loss, others) = (loss_and_grads(model, batch, batch + 1) for model in both)
    assert loss == other_loss
    assert all(np.array_equal(grads[name], others[name]) for name in grads)


def test_what_has_no_gradients_is_refused() -> None:
    model = gpt2rs.GPT2.from_pretrained(CASES["plain"])
    ids = np.zeros((1, 3), np.int64)
    with pytest.raises(ValueError, match="int8"):
        loss_and_grads(gpt2rs.GPT2.from_pretrained(CASES["plain"], dtype="int8"), ids, ids)
    for inputs, targets, message in (
        (ids[0], ids[0], "inputs"),
        (ids, ids[:, 1:], r"targets \(1, 2\)"),
        (ids * 0.5, ids, "inputs"),
        (ids - 1, ids, "inputs"),
        (ids, ids + 512, "512"),
        (ids[:0], ids[:0], "at least one"),
        (np.zeros((1, 129), np.int64), np.zeros((1, 129), np.int64), "129"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_and_grads(model, inputs, targets)


def trainer(**options: object) -> _core.Trainer:
    config = _core.Config.from_json(
        '{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 40, "model_type": "gpt2"}'
    )
    settings: dict[str, object] = {"batch_size": 2, "n_tokens": 32, "seed": 1, **options}
    return _core.Trainer.random(config, **settings)  # type: ignore[arg-type]


def test_tensors_go_out_and_in() -> None:
    one, other = trainer(), trainer(seed=2)
    assert one.names()[:2] == ["wte.weight", "wpe.weight"]
    for name in one.names():
        for kind in ("weight", "exp_avg", "exp_avg_sq", "grad"):
            other.set_tensor(kind, name, one.tensor(kind, name))
        assert one.tensor("weight", name).shape == tuple(one.shape(name))
    ids = np.arange(64, dtype=np.uint32).reshape(2, 32) % 40
    assert one.loss(ids, ids) == other.loss(ids, ids)
    with pytest.raises(ValueError, match="expected shape"):
        one.set_tensor("weight", "wpe.weight", np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="kind"):
        one.tensor("momentum", "wpe.weight")
    with pytest.raises(KeyError, match="wpe"):
        one.tensor("weight", "wpe")


def test_it_learns_a_text_by_heart_and_gives_the_model() -> None:
    run = trainer()
    ids = (np.arange(66, dtype=np.uint32) * 7 % 40).reshape(2, 33)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    first = run.loss(inputs, targets)
    assert first == pytest.approx(np.log(40), rel=0.05)
    for step in range(1, 61):
        for micro_step in range(2):
            row = slice(micro_step, micro_step + 1)
            run.accumulate(inputs[row], targets[row], step=step, micro_step=micro_step, scale=0.5)
        assert run.update(lr=1e-2, step=step) > 0
    assert run.loss(inputs, targets) < 0.1 * first
    model = gpt2rs.GPT2(run.model())
    generated = model.generate([int(ids[0, 0]), int(ids[0, 1])], max_new_tokens=5, eos_token_id=None)
    assert list(generated.tokens) == ids[0, 2:7].tolist()


def test_options_out_of_range() -> None:
    for options, message in (
        ({"precision": "float16"}, "precision"),
        ({"bias": "some"}, "bias"),
        ({"dropout": 1.5}, "dropout"),
        ({"n_tokens": 33}, "n_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_threads": 0}, "n_threads"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(**options)
    run = trainer()
    ids = np.zeros((3, 4), np.uint32)
    with pytest.raises(ValueError, match="sequences"):
        run.loss(ids, ids)
    with pytest.raises(ValueError, match="step"):
        run.update(lr=1e-3, step=0)
    plan = run.memory_plan
    assert [what for what, _ in plan][:2] == ["weights", "gradients"]
    assert all(size > 0 for _, size in plan)
