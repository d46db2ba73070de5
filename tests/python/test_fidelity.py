"""compare: what a variant of a model costs in accuracy; and the copy of a model with outlier channels."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

import gpt2rs
from golden_cases import CASES
from gpt2rs.fidelity import VARIANTS, measure, variant_options
from scripted import constant_logits

TEXT = "But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n" * 3


def probabilities(logits: np.ndarray) -> list[float]:
    """Softmax of one row, each number by itself."""
    largest = max(logits.tolist())
    weights = [math.exp(logit - largest) for logit in logits.tolist()]
    return [weight / math.fsum(weights) for weight in weights]


@pytest.mark.parametrize("stride", [None, 1, 47])
def test_against_naive_loops(stride: int | None) -> None:
    """Every row's distributions by themselves, in the windows of Hugging Face's guide."""
    reference = gpt2rs.GPT2.from_pretrained(CASES["odd_shapes"], dtype="float32")
    variant = gpt2rs.GPT2.from_pretrained(CASES["odd_shapes"], dtype="bfloat16", kv_dtype="float32")
    n_ctx = reference.config.n_ctx
    ids = np.random.default_rng(2).integers(0, reference.config.n_vocab, 110).tolist()
    divergences, losses, reference_losses, same = [], [], [], []
    previous_end = 1
    for begin in range(0, len(ids), stride or n_ctx // 2):
        end = min(begin + n_ctx, len(ids))
        rows = zip(reference.logits(ids[begin:end]), variant.logits(ids[begin:end]), strict=True)
        for position, pair in enumerate(rows, begin):
            if not previous_end <= position + 1 < end:
                continue
            p, q = map(probabilities, pair)
            divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            losses.append(-math.log(q[ids[position + 1]]))
            reference_losses.append(-math.log(p[ids[position + 1]]))
            same.append(p.index(max(p)) == q.index(max(q)))
        previous_end = end
        if end == len(ids):
            break
    assert len(losses) == len(ids) - 1

    (result,) = gpt2rs.compare(CASES["odd_shapes"], ids, ["bfloat16/kv=float32"], stride=stride)
    assert (result.variant, result.n_positions) == ("bfloat16/kv=float32", len(ids) - 1)
    assert result.weight_bytes == variant.memory_footprint() < reference.memory_footprint()
    assert result.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-12)
    ratio = math.exp((math.fsum(losses) - math.fsum(reference_losses)) / len(losses))
    assert result.perplexity_ratio == pytest.approx(ratio, rel=1e-12)
    # Divergences are small differences: V terms below 1, each off by some 2^-53.
    tolerance = 2.0**-53 * 8 * reference.config.n_vocab
    assert result.mean_kl == pytest.approx(math.fsum(divergences) / len(divergences), abs=tolerance)
    assert result.max_kl == pytest.approx(max(divergences), abs=tolerance)
    assert result.kl_99 == pytest.approx(np.quantile(divergences, 0.99), abs=tolerance)
    assert result.same_top == sum(same) / len(same)
    # The variant does differ, or all of this would hold of anything.
    assert result.mean_kl > 100 * tolerance


def test_perplexity_is_that_of_score(shakespeare: gpt2rs.GPT2) -> None:
    (result,) = gpt2rs.compare("shakespeare", TEXT * 4, ["bfloat16"])
    # score() takes its logarithms in float32.
    assert result.perplexity == pytest.approx(shakespeare.score(TEXT * 4).perplexity, rel=1e-5)


def test_a_model_beside_itself() -> None:
    results = gpt2rs.compare("shakespeare", TEXT, ["float32", "bfloat16", "float32"], n_threads=1)
    assert [result.variant for result in results] == ["float32", "bfloat16", "float32"]
    for result in (results[0], results[2]):
        assert (result.mean_kl, result.kl_99, result.max_kl) == (0, 0, 0)
        assert (result.same_top, result.perplexity_ratio) == (1, 1)


def test_kv_dtype_is_taken() -> None:
    """The built-in model is stored in bfloat16, so that only its keys and values are rounded."""
    exact, rounded = gpt2rs.compare("shakespeare", TEXT, ["bfloat16/kv=float32", "float32/kv=bfloat16"])
    assert exact.max_kl == 0
    assert 0 < rounded.mean_kl < rounded.kl_99 <= rounded.max_kl < 1e-3
    assert exact.weight_bytes < rounded.weight_bytes


def test_a_known_divergence() -> None:
    p, q = (constant_logits(np.log(weights).tolist()) for weights in ([2, 1, 1], [1, 1, 2]))
    result = measure(p, q, [0, 1, 2, 0], variant="q")
    # 1/2 ln 2 + 1/4 ln 1 + 1/4 ln 1/2.
    assert result.mean_kl == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert result.max_kl == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert result.same_top == 0
    assert result.perplexity == pytest.approx((4 * 2 * 4) ** (1 / 3), rel=1e-6)
    assert result.perplexity_ratio == pytest.approx(1, rel=1e-6)


def test_the_reference_weighs_the_divergence() -> None:
    p, q = (constant_logits(np.log(weights).tolist()) for weights in ([3, 1], [1, 1]))
    assert measure(p, q, [0, 1], variant="q").mean_kl == pytest.approx(
        0.75 * math.log(1.5) - 0.25 * math.log(2)
    )
    assert measure(q, p, [0, 1], variant="p").mean_kl == pytest.approx(0.5 * math.log(4 / 3))
    # The lowest id among equals.
    assert measure(p, q, [0, 1], variant="q").same_top == 1


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    p, q = constant_logits([0.0, 1.0, 2.0]), constant_logits([96.0, 97.0, 98.0])
    result = measure(p, q, [0, 1, 2], variant="q")
    assert (result.max_kl, result.same_top) == (0, 1)


def test_logits_that_are_not_finite() -> None:
    finite, broken = constant_logits([0.0, 1.0]), constant_logits([0.0, math.inf])
    with pytest.raises(ValueError, match=r"int4: logits of tokens 0 to 2 .*finite"):
        measure(finite, broken, [0, 1, 0], variant="int4")
    with pytest.raises(ValueError, match=r"float32: logits .*finite"):
        measure(broken, finite, [0, 1, 0], variant="int4")


def test_variants_choose_options() -> None:
    assert variant_options("int8") == {"dtype": "int8"}
    assert variant_options("int4/kv=int8") == {"dtype": "int4", "kv_dtype": "int8"}
    assert variant_options("bfloat16/kv=float32/fast") == {
        "dtype": "bfloat16",
        "kv_dtype": "float32",
        "precision": "fast",
    }
    for variant in VARIANTS:
        assert variant_options(variant)["dtype"] == variant.partition("/")[0]


@pytest.mark.parametrize(
    "variant", ["", "int2", "int8/", "int8/kv", "int8/kv=int4", "int8/slow", "/fast", "int8/fast/fast"]
)
def test_unknown_variants(variant: str) -> None:
    with pytest.raises(ValueError, match=r"variant is '.*float32, bfloat16, int8, int4.*/fast.*/kv="):
        gpt2rs.compare("./no/such/folder", TEXT, ["float32", variant])


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="variants is empty"):
        gpt2rs.compare("shakespeare", TEXT, [])
    with pytest.raises(ValueError, match="must be a list"):
        gpt2rs.compare("shakespeare", TEXT, "bfloat16")
    with pytest.raises(TypeError, match="kv_dtype is part of a variant"):
        gpt2rs.compare("shakespeare", TEXT, kv_dtype="float32")
    with pytest.raises(ValueError, match=r"1 token.*2 at least"):
        gpt2rs.compare("shakespeare", [1], ["float32"])
    with pytest.raises(ValueError, match="stride is 0"):
        gpt2rs.compare("shakespeare", TEXT, ["float32"], stride=0)
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        gpt2rs.compare("./no/such/folder", TEXT, ["float32"])


@pytest.fixture(scope="module")
def outliers() -> ModuleType:
    """benches/outliers.py."""
    path = Path(__file__).parents[2] / "benches" / "outliers.py"
    spec = importlib.util.spec_from_file_location("outliers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestOutliers:
    @pytest.mark.parametrize("name", ["shakespeare", "odd_shapes"])
    def test_logits_stay_as_they_were(self, outliers: ModuleType, name: str, tmp_path: Path) -> None:
        source = CASES.get(name, name)
        original = gpt2rs.GPT2.from_pretrained(source, dtype="float32")
        ids = np.random.default_rng(0).integers(0, original.config.n_vocab, original.config.n_ctx)
        expected = original.logits(ids)
        # Products by a power of two are exact, and so is all that follows from them.
        outliers.save_with_outliers(source, tmp_path / "exact", factor=32.0)
        np.testing.assert_array_equal(gpt2rs.GPT2.from_pretrained(tmp_path / "exact").logits(ids), expected)
        # By 30, gain, bias and row are rounded once each: 3 eps / 2 on some of the terms of each sum, as much
        # as the sums' own rounding, over a few layers.
        outliers.save_with_outliers(source, tmp_path / "near")
        near = gpt2rs.GPT2.from_pretrained(tmp_path / "near").logits(ids)
        np.testing.assert_allclose(near, expected, rtol=0, atol=64 * 2.0**-23 * np.abs(expected).max())
        assert not np.array_equal(near, expected)

    def test_are_where_they_are_said_to_be(self, outliers: ModuleType, tmp_path: Path) -> None:
        drawn = outliers.save_with_outliers("shakespeare", tmp_path / "copy", share=0.02, seed=3)
        assert all(len(set(channels.tolist())) == 4 for channels in drawn)
        gpt2rs.GPT2.from_pretrained("shakespeare", dtype="float32").save_pretrained(tmp_path / "original")
        copy, original = (load_file(tmp_path / name / "model.safetensors") for name in ("copy", "original"))
        assert copy.keys() == original.keys()
        changed = {name for name in copy if not np.array_equal(copy[name], original[name])}
        names = [f"transformer.h.{layer}.{norm}" for layer in range(6) for norm in ("ln_1", "ln_2")]
        for name, channels in zip(names, drawn, strict=True):
            matrix = name.replace("ln_1", "attn.c_attn").replace("ln_2", "mlp.c_fc") + ".weight"
            ratio = copy[f"{name}.weight"] / original[f"{name}.weight"]
            np.testing.assert_array_equal(np.flatnonzero(ratio != 1), np.sort(channels))
            np.testing.assert_allclose(ratio[channels], 30, rtol=1e-6)
            rows = np.flatnonzero((copy[matrix] != original[matrix]).any(axis=1))
            np.testing.assert_array_equal(rows, np.sort(channels))
            changed -= {matrix, f"{name}.weight", f"{name}.bias"}
        assert changed == set()
