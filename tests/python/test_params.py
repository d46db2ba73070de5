"""Models from the textbooks' nested dict of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import gpt2rs
from golden_cases import CASES, expected
from gpt2rs.checkpoints import Source, from_params
from small_models import (
    N_CTX,
    N_HEAD,
    C,
    V,
    draw,
    from_arrays,
    parameters,
)


def test_parameters_without_blocks() -> None:
    want = expected("no_blocks")
    stored = load_file(CASES["no_blocks"] / "model.safetensors")
    params: dict[str, Any] = {name: stored[f"transformer.{name}.weight"] for name in ("wte", "wpe")}
    params["ln_f"] = {"g": stored["transformer.ln_f.weight"], "b": stored["transformer.ln_f.bias"]}
    for blocks in ({}, {"blocks": []}, {"blocks": ()}):
        model = gpt2rs.GPT2.from_params({**params, **blocks}, n_head=2)
        assert model.config.n_layer == 0
        for ids, logits in zip(want["input_ids"], want["logits"], strict=True):
            np.testing.assert_allclose(model.logits(ids), logits, rtol=0, atol=1e-5)


def test_a_final_norm_at_the_top() -> None:
    """The textbook's loader of OpenAI's files leaves ln_f's arrays beside wte."""
    params = parameters()
    flat = {key: value for key, value in params.items() if key != "ln_f"} | params["ln_f"]
    np.testing.assert_array_equal(from_arrays(flat), from_arrays(params))


def test_dtypes_orders_and_views_of_arrays() -> None:
    params = parameters()
    c_fc = params["blocks"][0]["mlp"]["c_fc"]
    want = from_arrays(params)
    for form in (np.asfortranarray, np.float64, lambda w: np.repeat(w, 2, axis=1)[:, ::2], np.ndarray.tolist):
        params["blocks"][0]["mlp"]["c_fc"] = {**c_fc, "w": form(c_fc["w"])}
        np.testing.assert_array_equal(from_arrays(params), want)


def test_settings_of_parameters() -> None:
    params = parameters()
    source = from_params(
        params, n_head=4, activation_function="relu", layer_norm_epsilon=1e-6, eos_token_id=3
    )
    assert isinstance(source, Source)
    assert (source.config.n_head, source.config.head_size) == (4, 2)
    assert (source.config.activation_function, source.config.eos_token_id) == ("relu", 3)
    assert source.config.layer_norm_epsilon == pytest.approx(1e-6)
    assert source.folder is None
    assert source.stored_dtype == "float32"
    assert not from_params(parameters(head=True), n_head=2).config.tie_word_embeddings
    with pytest.raises(ValueError, match="n_head"):
        from_params(params, n_head=3)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The nested dict with one entry replaced, or removed for a value of None."""
    params = parameters()
    holder: Any = params
    *route, last = path.split("/")
    for key in route:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return params


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("wte", None, r"wte: missing, expected an array of shape \(any, any\)"),
        ("wte", draw(0, V), r"wte: shape \(11\), expected \(any, any\)"),
        ("wte", draw(0, 0, C), r"wte: shape \(0, 8\)"),
        ("wte", np.ones((V, C), np.int64), "wte: dtype int64, expected float16, float32 or float64"),
        ("wte", "words", "wte: dtype <U5"),
        ("wpe", draw(0, N_CTX, C + 1), r"wpe: shape \(6, 9\), expected \(any, 8\)"),
        ("ln_f", None, "ln_f: expected a dict, found nothing"),
        ("ln_f/g", draw(0, C + 1), r"ln_f\.g: shape \(9\), expected \(8\)"),
        ("blocks", {"0": 1}, "blocks: expected a list of dicts, found dict"),
        (
            "blocks/1/attn/c_attn/w",
            draw(0, C, C),
            r"blocks\[1\]\.attn\.c_attn\.w: shape \(8, 8\), expected \(8, 24\)",
        ),
        (
            "blocks/1/mlp/c_fc/w",
            draw(0, C, 7),
            r"blocks\[1\]\.mlp\.c_fc\.w: shape \(8, 7\), expected \(8, 32\)",
        ),
        ("blocks/0/mlp/c_proj/b", draw(0, 1), r"blocks\[0\]\.mlp\.c_proj\.b: shape \(1\), expected \(8\)"),
        ("blocks/0/mlp/c_proj/w", None, r"blocks\[0\]\.mlp\.c_proj\.w: missing"),
        ("blocks/0/ln_2", 3, r"blocks\[0\]\.ln_2: expected a dict, found int"),
        ("blocks/0/attn/c_attn/bias", draw(0, 3 * C), r"blocks\[0\]\.attn\.c_attn: unknown entry 'bias'"),
        ("wpos", draw(0, 2, 2), "params: unknown entry 'wpos'"),
    ],
)
def test_parameters_that_do_not_fit(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_params(changed(path, value), n_head=N_HEAD)
