"""Settings: checked in one place, and the same after a round through a file."""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2rs.train import TrainSettings
from gpt2rs.train.schedule import learning_rate
from gpt2rs.train.settings_file import read_settings, toml


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps is -1; it must be an int, at least 0"),
        ({"steps": 1.5}, "steps is 1.5; it must be an int"),
        ({"batch_size": 0}, "batch_size is 0; it must be an int, at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be a finite number, at least 0 and below 1"),
        ({"lr": math.nan}, "lr is nan; it must be a finite number, at least 0"),
        ({"min_lr": 1e-2, "lr": 1e-3}, "min_lr is 0.01; it must be at most lr, which is 0.001"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; it must be"),
        ({"betas": 0.9}, "betas is 0.9; it must be two numbers"),
        ({"eps": 0}, "eps is 0; it must be a finite number, above 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be an int, from 0"),
        ({"bias": "some"}, "bias is 'some'; it must be one of 'all', 'no-qkv', 'none'"),
        ({"precision": "float16"}, "precision is 'float16'; it must be one of 'float32', 'bfloat16'"),
        ({"preset": "gpt3"}, "preset is 'gpt3'; it must be one of 'gpt2'"),
        ({"data": 3}, "data is 3; it must be a path or a list of paths"),
        ({"data": ["a", ""]}, r"data\[1\] is ''; it must be a path"),
        ({"val_fraction": 1}, "val_fraction is 1; it must be a finite number, at least 0 and below 1"),
        ({"recompute": 1}, "recompute is 1; it must be True or False"),
        ({"init_from": "gpt2", "n_layer": 2}, "n_layer is 2, and init_from is given, too"),
        ({"tokenizer": "none"}, 'n_vocab is None, and tokenizer is "none"'),
        ({"n_layers": 2}, "unknown setting 'n_layers'; did you mean 'n_layer'?"),
    ],
)
def test_what_is_out_of_range_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings.of(values)


def test_defaults_are_the_recipe() -> None:
    settings = TrainSettings()
    assert settings.batching(1024) == (512, 4)
    assert settings.steps * 2**19 == pytest.approx(10e9, rel=1e-4)
    assert (settings.warmup_steps, settings.final_lr) == (715, pytest.approx(6e-5))
    assert (settings.betas, settings.eps, settings.weight_decay, settings.max_norm) == (
        (0.9, 0.95),
        1e-8,
        0.1,
        1,
    )


def test_batching() -> None:
    assert TrainSettings(batch_size=12).batching(256) == (12, 12)
    assert TrainSettings(batch_size=12, tokens_per_step=2**15).batching(256) == (128, 12)
    assert TrainSettings(tokens_per_step=512).batching(256) == (2, 2)
    assert TrainSettings(batch_size=64, tokens_per_step=512).batching(256) == (2, 2)
    with pytest.raises(ValueError, match=r"tokens_per_step is 500; it must be a multiple of .* 256"):
        TrainSettings(tokens_per_step=500).batching(256)


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097")


def cosine(x: Fraction) -> Decimal:
    """cos(pi x) for x from 0 to 1, by its series."""
    z = (PI * x.numerator / x.denominator) ** 2
    term, total = Decimal(1), Decimal(0)
    for n in range(1, 80, 2):
        total += term
        term *= -z / (n * (n + 1))
    return total


class TestSchedule:
    @given(st.integers(0, 50), st.integers(2, 3000), st.floats(1e-6, 1), st.floats(0, 1))
    def test_warms_up_in_a_line_and_falls_as_a_cosine(
        self, warmup: int, steps: int, lr: float, share: float
    ) -> None:
        settings = TrainSettings(steps=warmup + steps, warmup=warmup, lr=lr, min_lr=lr * share)
        rates = [learning_rate(step, settings) for step in range(settings.steps)]
        assert rates[:warmup] == pytest.approx([lr * (i + 1) / warmup for i in range(warmup)], rel=1e-15)
        assert rates[warmup] == lr
        assert rates[-1] == settings.min_lr
        if warmup:
            assert rates[warmup - 1] == lr
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
        for i in range(0, steps, max(1, steps // 7)):
            with localcontext(Context(prec=50)):
                half = (1 + cosine(Fraction(i, steps - 1))) / 2
                exact = Decimal(lr * share) + (Decimal(lr) - Decimal(lr * share)) * half
                # In units of 2**-53 of lr: 1 for the place in the wave, 3 for the half wave, which is 0.5 at
                # most, 1 for its product with the difference, 1 for the sum.
                assert abs(Decimal(rates[warmup + i]) - exact) <= 6 * Decimal(lr) * Decimal(2) ** -53

    def test_is_these_bits(self) -> None:
        """On every machine: a resumed run relies on it."""
        settings = TrainSettings(steps=3000, warmup=100, lr=2e-3)
        assert [learning_rate(step, settings).hex() for step in (0, 98, 700, 1549, 1550, 2900)] == [
            "0x1.4f8b588e368f1p-16",
            "0x1.0385c67dfe32ap-9",
            "0x1.dc25f715c88eap-10",
            "0x1.207c79fad65e4p-10",
            "0x1.203b063997679p-10",
            "0x1.ae483a9195955p-13",
        ]

    @given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 100))
    def test_stays_in_range_whatever_the_lengths(self, steps: int, warmup: int, step: int) -> None:
        settings = TrainSettings(steps=steps, warmup=warmup, lr=1.0)
        assert 0 < learning_rate(step, settings) <= 1.0


paths = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


class TestFile:
    @given(
        st.builds(
            TrainSettings,
            data=st.lists(paths, max_size=3),
            sample_prompt=st.none() | paths,
            lr=st.floats(0, 1e300),
            eps=st.floats(5e-324, 1),
            seed=st.integers(0, 2**64 - 1),
            betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
            recompute=st.booleans(),
            n_layer=st.none() | st.integers(0, 100),
        )
    )
    def test_gives_the_settings_back(
        self, tmp_path_factory: pytest.TempPathFactory, settings: TrainSettings
    ) -> None:
        path = tmp_path_factory.mktemp("run") / "settings.toml"
        path.write_text(toml(settings), encoding="utf-8", newline="")
        assert TrainSettings.of(read_settings(path)) == settings

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("steps = ", r"settings\.toml: "),
            ("steps = -1", r"settings\.toml: steps is -1; it must be an int"),
            ("step = 1", r"settings\.toml: unknown setting 'step'; did you mean 'steps'\?"),
            ('lr = "fast"', r"settings\.toml: lr is 'fast'; it must be a finite number, at least 0"),
            ("[model]\nn_layer = 1", r"settings\.toml: unknown setting 'model'"),
        ],
    )
    def test_mistakes_name_the_file(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_settings(path)

    def test_that_is_no_text_names_the_file_once(self, tmp_path: Path) -> None:
        path = tmp_path / "settings.toml"
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError) as error:
            read_settings(path)
        assert str(error.value) == f"{path}: expected UTF-8 text, invalid start byte at byte 0"

    def test_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no such settings file"):
            read_settings(tmp_path / "settings.toml")
