"""Checkpoints of the trainer, loaded by Hugging Face transformers: the same model, and the same tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import error_bounds
from gpt2rs.train import Trainer, TrainSettings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(params=["all", "no-qkv", "none"])
def bias(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def trained(request: pytest.FixtureRequest, small: dict[str, Any], bias: str) -> Trainer:
    values = {**small, "n_layer": 2, "bias": bias, "tie_word_embeddings": request.param, "sample_every": 0}
    trainer = Trainer(TrainSettings(**values))
    trainer.fit([])
    return trainer


def test_a_checkpoint_is_theirs(trained: Trainer, bias: str) -> None:
    folder = Path(trained.settings.out) / "last"
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        absent = set(theirs.state_dict()) - {"lm_head.weight"} - set(file.keys())
    # Their GPT-2 has all biases; those that a checkpoint leaves out are told to be missing, and are zeros.
    assert set(info["missing_keys"]) == absent
    assert all(name.endswith(".bias") and not theirs.state_dict()[name].any() for name in absent)
    assert bool(absent) == (bias != "all")
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    tied = theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    assert tied == trained.settings.tie_word_embeddings
    ids = np.random.default_rng(0).integers(0, 1024, (2, 32), dtype=np.uint32)
    with torch.no_grad():
        rows = torch.from_numpy(ids.astype(np.int64))
        exact = theirs.double().eval()(rows, labels=rows)
    model = trained.model()
    bound = error_bounds.cpu(model.config, float(exact.logits.abs().max()), rounded=False)
    for row, expected in zip(ids, exact.logits.numpy(), strict=True):
        assert np.abs(model.logits(row) - expected).max() < bound
    assert trained.core.loss(ids[:, :-1], ids[:, 1:]) == pytest.approx(exact.loss.item(), abs=2 * bound)


def test_its_tokenizer_is_theirs(trained: Trainer, text: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(Path(trained.settings.out) / "last")
    sample = text.read_text()[:1000]
    assert theirs(sample)["input_ids"] == trained.vocabulary.encoding.encode_ordinary(sample)
    assert theirs.eos_token_id == trained.vocabulary.end_of_text
