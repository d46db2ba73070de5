"""Runs: what they write, that they go on to the same bits, and how they end when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import filling_up
from safetensors import safe_open

import gpt2rs
from gpt2rs.train import (
    Accumulated,
    Diverged,
    Evaluated,
    Event,
    Finished,
    Sampled,
    Saved,
    Started,
    Step,
    Trainer,
    TrainSettings,
    durable,
)
from gpt2rs.train.evaluation import HeldOut
from gpt2rs.train.log import read_log
from gpt2rs.train.run_folder import RunFolder
from gpt2rs.train.tensor_file import read_tensors

TOLD = ("step", "evaluated", "sampled")
COMMAND = [sys.executable, "-m", "gpt2rs.cli"]


def contents(checkpoint: Path) -> dict[str, bytes]:
    """All that decides how a run goes on."""
    return {name: (checkpoint / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    return {
        e["step"]: (e["loss"], e["grad_norm"]) for e in read_log(folder / "log.jsonl") if e["event"] == "step"
    }


def finished(values: dict[str, Any], out: Path) -> Path:
    """The folder of a run that was never interrupted."""
    Trainer(TrainSettings(**{**values, "out": str(out)})).fit([])
    return out


class TestRun:
    def test_learns_and_tells(self, settings: TrainSettings) -> None:
        events: list[Event] = []
        Trainer(settings).fit([events.append])
        kinds = [type(event) for event in events]
        assert (kinds[0], kinds[-1]) == (Started, Finished)
        assert kinds.count(Step) == 12
        assert [(e.done, e.sequences) for e in events if isinstance(e, Accumulated)] == [
            (2, 5),
            (4, 5),
            (5, 5),
        ] * 12
        evaluated = [event for event in events if isinstance(event, Evaluated)]
        assert [event.step for event in evaluated] == [0, 6, 12]
        assert evaluated[0].val_loss == pytest.approx(np.log(1024), abs=0.2)
        assert evaluated[2].val_loss < evaluated[0].val_loss - 0.1
        assert [event.step for event in events if isinstance(event, Sampled)] == [0, 6, 12]
        saved = [event.step for event in events if isinstance(event, Saved)]
        assert {4, 8, 12} <= set(saved)
        assert events[-1] == Finished(12, "done")
        steps = [event for event in events if isinstance(event, Step)]
        assert {step.tokens for step in steps} == {160}
        assert steps[0].lr == pytest.approx(1e-2)
        assert steps[-1].lr == pytest.approx(1e-3)

    def test_loss_per_character(self, settings: TrainSettings, text: Path) -> None:
        trainer = Trainer(settings)
        events: list[Event] = []
        trainer.fit([events.append])
        last = [event for event in events if isinstance(event, Evaluated)][-1]
        held_out = text.read_bytes()[int(text.stat().st_size * 0.9) :].decode()
        assert last.tokens == len(trainer.model().tokenizer.encode_ordinary(held_out))
        assert last.val_loss_per_char == pytest.approx(last.val_loss * last.tokens / len(held_out))

    def test_log_has_every_event(self, settings: TrainSettings) -> None:
        events: list[Event] = []
        Trainer(settings).fit([events.append])
        log = list(read_log(Path(settings.out) / "log.jsonl"))
        assert [entry["event"] for entry in log] == [
            type(event).__name__.lower() for event in events if not isinstance(event, Accumulated)
        ]
        assert [e["loss"] for e in log if e["event"] == "step"] == [
            e.loss for e in events if isinstance(e, Step)
        ]

    def test_checkpoint_is_a_model(self, settings: TrainSettings) -> None:
        trainer = Trainer(settings)
        trainer.fit([])
        folder = Path(settings.out) / "last"
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "model.safetensors",
            "optimizer.safetensors",
            "position.json",
            "vocab.json",
            "merges.txt",
        }
        model = gpt2rs.GPT2.from_pretrained(folder)
        np.testing.assert_array_equal(model.logits("my lord"), trainer.model().logits("my lord"))
        config = json.loads((folder / "config.json").read_text())
        assert (config["model_type"], config["torch_dtype"], config["attn_pdrop"]) == ("gpt2", "float32", 0.1)

    def test_keeps_the_last_and_the_best(self, small: dict[str, Any]) -> None:
        settings = TrainSettings(**{**small, "eval_every": 1, "save_every": 3})
        run = RunFolder(Path(settings.out))
        seen: list[tuple[int, int, list[int]]] = []
        best: list[Evaluated] = []

        def look(event: Event) -> None:
            if isinstance(event, Evaluated) and event.best:
                best.append(event)
            if isinstance(event, Saved):
                seen.append((event.step, best[-1].step, list(run.checkpoints())))

        Trainer(settings).fit([look])
        assert len(seen) > 4
        for last, best_step, kept in seen:
            assert kept == sorted({last, best_step})
        assert (run.path / "last").resolve().name == "step-000012"
        assert (run.path / "best").resolve().name == f"step-{best[-1].step:06d}"

    def test_stops_when_a_callback_says_so(self, settings: TrainSettings) -> None:
        trainer = Trainer(settings)

        def stop(event: Event) -> None:
            if isinstance(event, Step) and event.step == 5:
                trainer.stop()

        trainer.fit([stop])
        assert list(RunFolder(Path(settings.out)).checkpoints()) == [5]
        trainer.fit([])
        assert trainer.n_steps == 12

    def test_a_folder_with_a_run_is_not_overwritten(self, settings: TrainSettings) -> None:
        Trainer(settings).fit([])
        before = contents(Path(settings.out) / "last")
        with pytest.raises(FileExistsError, match="has a run already; go on with it"):
            Trainer(settings).fit([])
        assert contents(Path(settings.out) / "last") == before

    def test_out_is_no_file(self, small: dict[str, Any], text: Path) -> None:
        with pytest.raises(
            NotADirectoryError, match=r"out is .*text\.txt, which is a file; it must be a folder"
        ):
            Trainer(TrainSettings(**{**small, "out": text})).fit([])

    def test_token_files_without_a_tokenizer(self, small: dict[str, Any], tmp_path: Path) -> None:
        np.random.default_rng(0).integers(0, 50, 4000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
        values = {**small, "data": str(tmp_path / "tokens.bin"), "tokenizer": "none", "n_vocab": 50}
        events: list[Event] = []
        Trainer(TrainSettings(**values)).fit([events.append])
        assert not [event for event in events if isinstance(event, Sampled)]
        assert [e.val_loss_per_char for e in events if isinstance(e, Evaluated)] == [None] * 3
        model = gpt2rs.GPT2.from_pretrained(Path(small["out"]) / "last")
        assert (model.config.n_vocab, model.tokenizer) == (50, None)
        Trainer.resume(small["out"], steps=13).fit([])

    @pytest.mark.parametrize(
        ("bias", "tied", "absent"),
        [
            ("all", True, {"lm_head.weight"}),
            ("no-qkv", False, {"transformer.h.0.attn.c_attn.bias"}),
            ("none", True, {"lm_head.weight", "transformer.h.0.mlp.c_fc.bias", "transformer.ln_f.bias"}),
        ],
    )
    def test_every_shape_is_saved_and_goes_on(
        self, small: dict[str, Any], bias: str, tied: bool, absent: set[str]
    ) -> None:
        values = {**small, "bias": bias, "tie_word_embeddings": tied, "steps": 2, "sample_every": 0}
        trainer = Trainer(TrainSettings(**values))
        trainer.fit([])
        with safe_open(Path(small["out"]) / "last" / "model.safetensors", framework="numpy") as file:
            names = set(file.keys())
        candidates = {
            "lm_head.weight",
            "transformer.h.0.attn.c_attn.bias",
            "transformer.h.0.mlp.c_fc.bias",
            "transformer.ln_f.bias",
        }
        if bias == "none":
            absent = absent | {"transformer.h.0.attn.c_attn.bias"}
        assert candidates - names == absent
        resumed = Trainer.resume(small["out"], steps=3)
        for name in trainer.core.names():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                np.testing.assert_array_equal(
                    resumed.core.tensor(kind, name), trainer.core.tensor(kind, name)
                )
        assert resumed.core.names() == trainer.core.names()

    def test_published_tokenizer_goes_with_the_checkpoint(
        self, small: dict[str, Any], gpt2_encoding: Any, text: Path
    ) -> None:
        Trainer(TrainSettings(**{**small, "tokenizer": "gpt2", "steps": 1, "n_embd": 2})).fit([])
        from gpt2rs.train.vocabulary import Vocabulary

        own = Vocabulary.named(str(Path(small["out"]) / "last")).encoding
        assert own._mergeable_ranks == gpt2_encoding._mergeable_ranks
        assert own._special_tokens == gpt2_encoding._special_tokens

    def test_has_its_folder_to_itself(self, settings: TrainSettings) -> None:
        trainer = Trainer(settings)

        def start_another(event: Event) -> None:
            if isinstance(event, Step) and event.step == 5:
                with pytest.raises(RuntimeError, match="another process is training in"):
                    Trainer.resume(settings.out).fit([])

        trainer.fit([start_another])
        assert trainer.n_steps == 12


class TestStep:
    def test_is_the_same_however_it_is_cut(self, small: dict[str, Any]) -> None:
        ids = np.random.default_rng(0).integers(0, 1024, (5, 33))
        results = []
        for batch_size in (5, 2):
            trainer = Trainer(TrainSettings(**{**small, "batch_size": batch_size, "dropout": 0.0}))
            results.append(trainer.step(ids[:, :-1], ids[:, 1:]))
        # Sums of float32 in another order.
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
        assert trainer.n_steps == results[0].step == 1

    def test_gives_the_same_bits_on_any_number_of_threads(self, small: dict[str, Any]) -> None:
        ids = np.random.default_rng(0).integers(0, 1024, (5, 33))
        found = []
        for n_threads in (1, 2, 5):
            trainer = Trainer(TrainSettings(**{**small, "n_threads": n_threads}))
            steps = [trainer.step(ids[:, :-1], ids[:, 1:]) for _ in range(3)]
            weights = [trainer.core.tensor("weight", name).tobytes() for name in trainer.core.names()]
            found.append(([(step.loss, step.grad_norm) for step in steps], weights))
        assert found[0] == found[1] == found[2]

    def test_needs_neither_data_nor_folder(self) -> None:
        trainer = Trainer(
            TrainSettings(n_layer=1, n_embd=8, n_head=2, n_ctx=8, tokenizer="none", n_vocab=20, warmup=0)
        )
        first = trainer.step([[1, 2, 3]] * 2, [[2, 3, 4]] * 2)
        for _ in range(20):
            last = trainer.step([[1, 2, 3]] * 2, [[2, 3, 4]] * 2)
        assert last.loss < first.loss
        with pytest.raises(ValueError, match="out is None"):
            trainer.fit([])

    @pytest.mark.parametrize(
        ("inputs", "targets", "message"),
        [
            ([1, 2], [2, 3], r"must be integers \(B, T\)"),
            ([[1.0]], [[2.0]], r"inputs are float64 of shape \(1, 1\)"),
            ([[1, 2]], [[2]], "must be of one shape"),
            (np.zeros((0, 3), int), np.zeros((0, 3), int), "with at least one token"),
            ([], [], r"inputs are float64 of shape \(0,\)"),
            ([[2**32]], [[0]], "inputs go from 4294967296 to 4294967296; ids are from 0 to 4294967295"),
            ([[-1]], [[0]], "inputs go from -1 to -1"),
            ([[1]], [[1024]], "1024|range"),
        ],
    )
    def test_refuses_what_is_no_batch(
        self, settings: TrainSettings, inputs: Any, targets: Any, message: str
    ) -> None:
        trainer = Trainer(settings)
        with pytest.raises(ValueError, match=message):
            trainer.step(inputs, targets)
        assert trainer.n_steps == 0
        assert trainer.step([[1]], [[2]]).step == 1


class TestFineTuning:
    def test_starts_from_a_checkpoint(self, small: dict[str, Any], tmp_path: Path) -> None:
        first = finished(small, tmp_path / "first")
        shape = ("n_layer", "n_embd", "n_head", "n_ctx", "tokenizer")
        values = {name: value for name, value in small.items() if name not in shape}
        events: list[Event] = []
        trainer = Trainer(TrainSettings(**{**values, "init_from": first / "last", "steps": 2}))
        model = gpt2rs.GPT2.from_pretrained(first / "last")
        np.testing.assert_array_equal(trainer.model().logits([5, 6]), model.logits([5, 6]))
        trainer.fit([events.append])
        before = [e for e in read_log(first / "log.jsonl") if e["event"] == "evaluated"][-1]
        assert next(e for e in events if isinstance(e, Evaluated)).val_loss == pytest.approx(
            before["val_loss"]
        )
        np.testing.assert_array_equal(
            gpt2rs.GPT2.from_pretrained(Path(small["out"]) / "last").logits([5]), trainer.model().logits([5])
        )

    def test_on_shorter_sequences_keeps_the_positions(self, small: dict[str, Any], tmp_path: Path) -> None:
        first = finished(small, tmp_path / "first")
        trainer = Trainer(TrainSettings(init_from=first / "last", n_ctx=16, batch_size=2))
        assert (trainer.n_tokens, trainer.config.n_ctx) == (16, 32)
        with pytest.raises(ValueError, match=r"n_ctx is 33; the model of .* has 32 positions"):
            Trainer(TrainSettings(init_from=first / "last", n_ctx=33, batch_size=2))


class TestResume:
    @pytest.mark.parametrize("stop_at", [1, 4, 6, 7, 11])
    def test_ends_in_the_same_bits(self, small: dict[str, Any], tmp_path: Path, stop_at: int) -> None:
        whole = finished(small, tmp_path / "whole")

        def fall_over(event: Event) -> None:
            if isinstance(event, Step) and event.step == stop_at:
                raise RuntimeError("as if killed")

        with pytest.raises(RuntimeError, match="as if killed"):
            Trainer(TrainSettings(**small)).fit([fall_over])
        Trainer.resume(small["out"]).fit([])
        out = Path(small["out"])
        assert contents(out / "last") == contents(whole / "last")
        assert losses(out) == losses(whole)
        assert contents(out / "best") == contents(whole / "best")

    @pytest.mark.parametrize(
        "values",
        [
            {"precision": "bfloat16"},
            {"recompute": True},
            {"precision": "bfloat16", "recompute": True, "bias": "none", "tie_word_embeddings": False},
        ],
        ids=lambda values: "-".join(values),
    )
    def test_on_other_threads_every_way_of_computing_ends_in_the_same_bits(
        self, small: dict[str, Any], tmp_path: Path, values: dict[str, Any]
    ) -> None:
        small = {**small, **values, "n_layer": 3, "sample_every": 0}
        whole = finished({**small, "n_threads": 1}, tmp_path / "whole")

        def fall_over(event: Event) -> None:
            if isinstance(event, Step) and event.step == 7:
                raise RuntimeError("as if killed")

        with pytest.raises(RuntimeError, match="as if killed"):
            Trainer(TrainSettings(**{**small, "n_threads": 2})).fit([fall_over])
        resumed = Trainer.resume(small["out"], n_threads=5)
        assert (resumed.n_steps, resumed.core.n_threads) == (6, 5)
        resumed.fit([])
        out = Path(small["out"])
        assert "n_threads = 5" in (out / "settings.toml").read_text()
        for link in ("last", "best"):
            assert contents(out / link) == contents(whole / link)
        assert losses(out) == losses(whole)
        # Each setting comes through to the core: rounded factors show, and what is computed again doesn't.
        plain = {**values, "precision": "float32", "recompute": False}
        usual = finished({**small, **plain}, tmp_path / "usual")
        assert (losses(usual) != losses(whole)) == (values.get("precision") == "bfloat16")
        memory = [sum(dict(Trainer.resume(folder).memory_plan).values()) for folder in (whole, usual)]
        assert (memory[0] < memory[1]) == ("recompute" in values)

    def test_goes_on_with_more_steps(self, small: dict[str, Any]) -> None:
        Trainer(TrainSettings(**small)).fit([])
        trainer = Trainer.resume(small["out"], steps=15)
        assert trainer.n_steps == 12
        trainer.fit([])
        assert sorted(losses(Path(small["out"]))) == list(range(1, 16))
        again = Trainer.resume(small["out"])
        assert again.settings.steps == 15

    def test_refuses_another_model_and_other_data(
        self, small: dict[str, Any], tmp_path: Path, text: Path
    ) -> None:
        Trainer(TrainSettings(**small)).fit([])
        with pytest.raises(
            ValueError, match="n_layer is 2, and the run was started with 1; start another run"
        ):
            Trainer.resume(small["out"], n_layer=2)
        with pytest.raises(ValueError, match=r"steps is 11; the run in .* has made 12 already"):
            Trainer.resume(small["out"], steps=11)
        with pytest.raises(ValueError, match="it was changed, or val_fraction was"):
            Trainer.resume(small["out"], steps=13, val_fraction=0.2).fit([])
        text.write_text(text.read_text()[:-100])
        with pytest.raises(ValueError, match="the data is not what the run began with"):
            Trainer.resume(small["out"], steps=13).fit([])

    def test_of_no_run_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no run to go on with"):
            Trainer.resume(tmp_path)

    def test_passes_over_what_a_killed_process_left(self, small: dict[str, Any]) -> None:
        Trainer(TrainSettings(**small)).fit([])
        out = Path(small["out"])
        (out / ".unfinished-step-000013").mkdir()
        (out / ".unfinished-step-000013" / "config.json").write_text("{")
        (out / "step-000014").mkdir()
        with (out / "log.jsonl").open("a") as log:
            log.write('{"event": "step", "step": 13, "lo')
        Trainer.resume(out, steps=13).fit([])
        assert (out / "last").resolve().name == "step-000013"
        assert not list(out.glob(".unfinished-*"))

    @pytest.mark.parametrize("name", ["optimizer.safetensors", "position.json", "model.safetensors"])
    def test_a_damaged_checkpoint_is_a_clear_error(self, small: dict[str, Any], name: str) -> None:
        Trainer(TrainSettings(**small)).fit([])
        path = Path(small["out"]) / "last" / name
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            Trainer.resume(small["out"])

    @pytest.mark.parametrize(
        ("field", "value"),
        [("step", "8"), ("step", None), ("best_val_loss", [1]), ("data", 3), ("sampled", 1), ("format", 1)],
    )
    def test_a_position_of_other_types_is_a_clear_error(
        self, small: dict[str, Any], field: str, value: Any
    ) -> None:
        Trainer(TrainSettings(**small)).fit([])
        path = Path(small["out"]) / "last" / "position.json"
        for content in ({**json.loads(path.read_text()), field: value}, [value], value):
            path.write_text(json.dumps(content))
            with pytest.raises(ValueError, match=r"position\.json: not a position of a run"):
                Trainer.resume(small["out"])

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
            {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]},
            {"dtype": "F32", "shape": [2], "data_offsets": None},
            {"dtype": "F32", "shape": [2], "data_offsets": ["a", "b"]},
            {"dtype": "F32", "shape": [2]},
            [],
        ],
    )
    def test_a_damaged_header_is_a_clear_error(self, tmp_path: Path, entry: Any) -> None:
        path = tmp_path / "optimizer.safetensors"
        header = json.dumps({"a": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(ValueError, match=r"optimizer\.safetensors: "):
            read_tensors(path, {"a": (2,)})

    def test_a_trainer_that_another_overtook_is_refused(self, small: dict[str, Any]) -> None:
        Trainer(TrainSettings(**small)).fit([])
        behind = Trainer.resume(small["out"], steps=14)
        Trainer.resume(small["out"], steps=13).fit([])
        with pytest.raises(RuntimeError, match="went on elsewhere in the meantime"):
            behind.fit([])


class TestInterrupted:
    """A signal at the worst places; the run then goes on as if none had come."""

    @pytest.mark.parametrize(
        ("place", "step"),
        [
            *(((HeldOut, "loss"), step) for step in (0, 6, 12)),
            *(((Trainer, "model"), step) for step in (0, 6, 12)),
            *(((RunFolder, "save"), step) for step in (6, 12)),
        ],
    )
    @pytest.mark.parametrize("is_before", [True, False])
    def test_what_was_due_is_made_up_for(
        self,
        small: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        place: tuple[type, str],
        step: int,
        is_before: bool,
    ) -> None:
        owner, name = place
        small["save_every"] = 6
        whole = finished(small, tmp_path / "whole")
        trainer = Trainer(TrainSettings(**small))
        own = getattr(owner, name)
        came = []

        def interrupted(*arguments: Any) -> Any:
            def interrupt() -> None:
                if trainer.n_steps == step and not came:
                    came.append(step)
                    signal.raise_signal(signal.SIGINT)

            if is_before:
                interrupt()
            result = own(*arguments)
            interrupt()
            return result

        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit([])
        Trainer.resume(small["out"]).fit([])
        self.assert_same(Path(small["out"]), whole)

    def test_while_old_checkpoints_are_removed(
        self, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small["eval_every"] = 0
        whole = finished(small, tmp_path / "whole")
        own = durable.remove_folder

        def interrupted(folder: Path) -> None:
            signal.raise_signal(signal.SIGINT)
            own(folder)

        monkeypatch.setattr(durable, "remove_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Trainer(TrainSettings(**small)).fit([])
        monkeypatch.undo()
        assert list(RunFolder(Path(small["out"])).checkpoints()) == [8]
        Trainer.resume(small["out"]).fit([])
        self.assert_same(Path(small["out"]), whole)

    @staticmethod
    def assert_same(out: Path, whole: Path) -> None:
        """The checkpoints, which of them is the best, and what was told of steps, losses and samples."""
        assert RunFolder(out).checkpoints().keys() == RunFolder(whole).checkpoints().keys()
        for link in ("last", "best"):
            if (whole / link).exists():
                assert contents(out / link) == contents(whole / link)
                found, expected = (json.loads((f / link / "position.json").read_text()) for f in (out, whole))
                assert {**found, "seconds": 0} == {**expected, "seconds": 0}
        assert [
            {**entry, "seconds": 0} for entry in read_log(out / "log.jsonl") if entry["event"] in TOLD
        ] == [{**entry, "seconds": 0} for entry in read_log(whole / "log.jsonl") if entry["event"] in TOLD]


class TestFailures:
    def test_an_absurd_rate_keeps_the_last_good_checkpoint(self, small: dict[str, Any]) -> None:
        Trainer(TrainSettings(**small)).fit([])
        good = contents(Path(small["out"]) / "last")
        with pytest.raises(
            Diverged, match=r"the loss (of|after) step 1\d is (nan|inf): the run diverged; a lower lr"
        ):
            Trainer.resume(small["out"], lr=1e30, min_lr=1e30, steps=40, save_every=1, eval_every=0).fit([])
        run = RunFolder(Path(small["out"]))
        # Steps whose model still computed may have been saved; each of them loads and computes.
        for checkpoint in run.checkpoints().values():
            assert np.isfinite(gpt2rs.GPT2.from_pretrained(checkpoint).logits([1, 2])).all()
        assert contents(run.path / "best") == good
        assert list(read_log(run.log))[-1]["reason"] == "failed"

    @pytest.mark.parametrize(
        ("poisoned", "message", "last", "n_steps"),
        [
            # Found by the next step; after step 8 by the look at the model before it is saved.
            (9, "the loss of step 10 is nan", "step-000008", 9),
            (8, "the loss after step 8 is nan", "step-000006", 8),
        ],
    )
    def test_weights_that_are_no_numbers_are_not_saved(
        self, settings: TrainSettings, poisoned: int, message: str, last: str, n_steps: int
    ) -> None:
        trainer = Trainer(settings)

        def poison(event: Event) -> None:
            if isinstance(event, Step) and event.step == poisoned:
                trainer.core.set_tensor("weight", "wpe.weight", np.full((32, 16), np.nan, np.float32))

        with pytest.raises(Diverged, match=message):
            trainer.fit([poison])
        assert RunFolder(Path(settings.out)).last().name == last
        assert trainer.n_steps == n_steps

    def test_a_disk_that_is_full_at_a_checkpoint(self, small: dict[str, Any], tmp_path: Path) -> None:
        def fill(event: Event) -> None:
            if isinstance(event, Step) and event.step == 7:
                leave_room_for(50_000)

        with filling_up() as leave_room_for, pytest.raises(OSError) as error:
            Trainer(TrainSettings(**small)).fit([fill])
        run = RunFolder(Path(small["out"]))
        folder, why = run.path / "step-000008", os.strerror(errno.EFBIG)
        assert str(error.value) == (
            f"cannot write the checkpoint {folder}: {why}; the last good one is {run.last()}"
        )
        assert not list(run.path.glob(".unfinished-*"))
        self.assert_goes_on(small, tmp_path)

    def test_a_disk_that_is_full_at_the_log(self, small: dict[str, Any], tmp_path: Path) -> None:
        run = RunFolder(Path(small["out"]))

        def fill(event: Event) -> None:
            if isinstance(event, Step) and event.step == 9:
                # For a part of the next line.
                leave_room_for(run.log.stat().st_size + 20)

        with filling_up() as leave_room_for, pytest.raises(OSError) as error:
            Trainer(TrainSettings(**small)).fit([fill])
        why = os.strerror(errno.EFBIG)
        assert str(error.value) == f"cannot write the log {run.log}: {why}; the checkpoints are as they were"
        assert run.last().name == "step-000008"
        assert not run.log.read_text().endswith("\n")
        self.assert_goes_on(small, tmp_path)

    @staticmethod
    def assert_goes_on(small: dict[str, Any], tmp_path: Path) -> None:
        """To the same bits as without the failure."""
        Trainer.resume(small["out"]).fit([])
        whole = finished(small, tmp_path / "whole")
        assert contents(Path(small["out"]) / "last") == contents(whole / "last")
        assert losses(Path(small["out"])) == losses(whole)


class TestProcesses:
    """Real ones, really killed."""

    @staticmethod
    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [*COMMAND, "train", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @staticmethod
    def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> bool:
        """Whether the run came to a step before it ended."""
        while process.poll() is None:
            if (out / "log.jsonl").exists() and max(losses(out), default=0) >= step:
                return True
            time.sleep(0.02)
        return False

    def test_killed_again_and_again_it_ends_in_the_same_bits(
        self, small: dict[str, Any], tmp_path: Path
    ) -> None:
        steps = 120
        whole = finished({**small, "steps": steps, "save_every": 3, "sample_every": 0}, tmp_path / "whole")
        (tmp_path / "settings.toml").write_text(
            (whole / "settings.toml").read_text().replace(str(whole), small["out"])
        )
        out = Path(small["out"])
        draw = random.Random(0)
        begin = ["--settings", str(tmp_path / "settings.toml"), "--no-plot"]
        lost = []
        for _ in range(3):
            process = self.start(*begin)
            there = max(losses(out), default=0) if out.exists() else 0
            if self.wait_for_step(process, out, there + draw.randint(2, 30)):
                time.sleep(draw.random() * 0.02)
                process.kill()
            process.communicate(timeout=60)
            last = RunFolder(out).last()
            lost.append(max(losses(out)) - (int(last.name[5:]) if last else 0))
            begin = ["--out", str(out), "--resume", "--no-plot"]
        text, _ = self.start(*begin).communicate(timeout=120)
        assert f"done after step {steps}" in text
        # The interval, and the steps that are made while a line is written.
        assert max(lost) <= 3
        assert contents(out / "last") == contents(whole / "last")
        assert losses(out) == losses(whole)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ctrl_c_saves_and_stops(self, small: dict[str, Any], number: int) -> None:
        out = Path(small["out"])
        path = out.with_name("settings.toml")
        from gpt2rs.train.settings_file import toml

        path.write_text(toml(TrainSettings(**{**small, "steps": 100_000, "save_every": 0, "eval_every": 0})))
        process = self.start("--settings", str(path), "--no-plot")
        assert self.wait_for_step(process, out, 5)
        process.send_signal(number)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        last = max(losses(out))
        assert f"interrupted after step {last}, which is saved; go on with --resume" in text
        assert "Traceback" not in text
        assert RunFolder(out).last().name == f"step-{last:06d}"
        assert [e["reason"] for e in read_log(out / "log.jsonl") if e["event"] == "finished"] == [
            "interrupted"
        ]
