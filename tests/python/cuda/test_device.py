"""Where a model runs: what `device` takes, what "auto" chooses, and what goes with a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver, Gpu, Kernel
from typer.testing import CliRunner

import gpt2rs
from golden_cases import CASES
from gpt2rs.cli import app

PLAIN = CASES["plain"]
CONFIG = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 128}
T4 = Gpu("Tesla T4", (7, 5), 16 * 10**9, 40)


@pytest.fixture(autouse=True)
def _two_gpus(driver: FakeDriver) -> None:
    driver.gpus = [Gpu("NVIDIA L4", (8, 9), 24 * 10**9, 58), Gpu()]
    # Models are loaded here, and nothing is computed with them.
    sizes = (8, *[4] * 8, 8, *[4] * 3)
    driver.kernels = {name: Kernel(sizes, lambda *_: None) for name in ("pack_fragments", "pack_columns")}


class TestNames:
    @pytest.mark.parametrize(
        ("device", "found"),
        [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("auto", "cuda:0")],
    )
    def test_place_a_model(self, device: str, found: str) -> None:
        for model in (
            gpt2rs.GPT2.from_pretrained(PLAIN, device=device),
            gpt2rs.GPT2.from_config(CONFIG, device=device),
        ):
            assert model.device == found
            assert model.isa == {"cuda:0": "sm_89", "cuda:1": "sm_90"}.get(found, model.isa)
            assert model.dtype == "float32"

    @pytest.mark.parametrize(
        "device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cuda:12345", "", None, 0]
    )
    def test_that_mean_nothing_are_refused(self, device: Any) -> None:
        message = f'device is {device!r}; it must be "cpu", "cuda", "cuda:N" or "auto"'
        with pytest.raises(ValueError) as raised:
            gpt2rs.GPT2.from_pretrained(PLAIN, device=device)
        assert str(raised.value) == message

    def test_are_looked_at_before_any_file(self, driver: FakeDriver) -> None:
        driver.gpus = []
        with pytest.raises(RuntimeError, match="finds no GPU"):
            gpt2rs.GPT2.from_pretrained("/nowhere", device="cuda")


class TestAuto:
    def test_passes_over_a_gpu_that_is_too_old_or_too_small(self, driver: FakeDriver) -> None:
        driver.gpus = [T4, Gpu("NVIDIA RTX A400", (8, 6), 1000), Gpu()]
        assert gpt2rs.GPT2.from_config(CONFIG, device="auto").device == "cuda:2"

    @pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "int4"}, {"kv_dtype": "int8"}])
    def test_takes_the_cpu_for_what_a_gpu_does_not_do(self, options: dict[str, str]) -> None:
        assert gpt2rs.GPT2.from_config(CONFIG, device="auto", **options).device == "cpu"

    def test_takes_the_cpu_for_packed_files(self, tmp_path: Path) -> None:
        gpt2rs.GPT2.from_pretrained(PLAIN).save_packed(tmp_path)
        assert gpt2rs.GPT2.from_pretrained(tmp_path, device="auto").device == "cpu"

    def test_heeds_n_threads_where_it_takes_the_cpu(self, driver: FakeDriver) -> None:
        assert gpt2rs.GPT2.from_config(CONFIG, device="auto", n_threads=2).n_threads == 1
        driver.gpus = []
        assert gpt2rs.GPT2.from_config(CONFIG, device="auto", n_threads=2).n_threads == 2

    def test_says_nothing_of_files_that_are_wrong_either_way(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            gpt2rs.GPT2.from_pretrained(tmp_path / "nowhere", device="auto")


class TestOptions:
    @pytest.mark.parametrize(("name", "value"), [("dtype", "int8"), ("dtype", "int4"), ("kv_dtype", "int8")])
    def test_of_types_that_a_gpu_does_not_hold_are_refused(self, name: str, value: str) -> None:
        message = (
            f"{name} is '{value}', and device is 'cuda'; on a GPU it must be \"float32\" or \"bfloat16\""
        )
        with pytest.raises(ValueError) as raised:
            gpt2rs.GPT2.from_pretrained("/nowhere", device="cuda", **{name: value})
        assert str(raised.value) == message

    def test_of_a_packed_file_s_type_are_refused_too(self, tmp_path: Path) -> None:
        gpt2rs.GPT2.from_pretrained(PLAIN, dtype="int8").save_packed(tmp_path / "int8")
        with pytest.raises(ValueError, match="dtype is 'int8', and device is 'cuda'"):
            gpt2rs.GPT2.from_pretrained(tmp_path / "int8", device="cuda")
        gpt2rs.GPT2.from_pretrained(PLAIN).save_packed(tmp_path / "float32")
        with pytest.raises(ValueError, match=r"a packed file .* a GPU needs the checkpoint"):
            gpt2rs.GPT2.from_pretrained(tmp_path / "float32", device="cuda")

    def test_of_threads_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^n_threads is 2, and device is 'cuda:1'; it is for the CPU$"):
            gpt2rs.GPT2.from_config(CONFIG, device="cuda:1", n_threads=2)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_of_types_that_a_gpu_holds_are_kept(self, dtype: str) -> None:
        model = gpt2rs.GPT2.from_config(CONFIG, device="cuda", dtype=dtype, kv_dtype="float32")
        assert (model.dtype, model.kv_dtype) == (dtype, "float32")


class TestAssistant:
    def test_on_a_gpu_does_not_go_with_a_model_on_the_cpu(self) -> None:
        cpu = gpt2rs.GPT2.from_config(CONFIG)
        gpu = gpt2rs.GPT2.from_config(CONFIG, device="cuda:1")
        with pytest.raises(ValueError, match=r"^assistant_model is on cuda:1; it must be on the CPU"):
            cpu.generate([1, 2], assistant_model=gpu)


class TestCommands:
    """Every command that loads a model takes --device."""

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    @pytest.mark.parametrize(
        "arguments",
        [
            ("generate", "ROMEO:"),
            ("score", "{text}"),
            ("compare", "{text}", "--variants", "float32"),
            ("bench", "--quick", "--model", str(PLAIN)),
        ],
        ids=lambda arguments: arguments[0],
    )
    def test_say_why_there_is_no_gpu(
        self, arguments: tuple[str, ...], driver: FakeDriver, tmp_path: Path
    ) -> None:
        driver.gpus = []
        text = tmp_path / "text.txt"
        text.write_text("To be, or not to be")
        result = self.run(*(each.format(text=text) for each in arguments), "--device", "cuda")
        assert result.exit_code == 1
        assert result.stderr == "gpt2rs: error: device is 'cuda', but the NVIDIA driver finds no GPU\n"

    def test_info_lists_the_gpus(self) -> None:
        shown = self.run("info").stdout
        assert "devices     cpu, cuda:0 (NVIDIA L4), cuda:1 (NVIDIA H200)\n" in shown
        assert json.loads(self.run("info", "--json").stdout)["devices"] == {
            "cpu": None,
            "cuda:0": {
                "name": "NVIDIA L4",
                "compute_capability": "8.9",
                "memory": 24 * 10**9,
                "problem": None,
            },
            "cuda:1": {
                "name": "NVIDIA H200",
                "compute_capability": "9.0",
                "memory": 140 * 10**9,
                "problem": None,
            },
        }

    def test_info_says_why_there_is_none_and_which_won_t_do(self, driver: FakeDriver) -> None:
        driver.gpus = [T4]
        assert (
            "devices     cpu; cuda:0 (Tesla T4) has compute capability 7.5; the kernels need 8.0"
        ) in self.run("info").stdout
        driver.library = False
        assert "devices     cpu; this machine has no NVIDIA driver (libcuda)" in self.run("info").stdout


def test_importing_the_package_loads_nothing_of_cuda() -> None:
    # cuda-python 12 puts a module of its own into every process.
    config = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9, "n_positions": 9}
    code = (
        "import sys; before = {*sys.modules}; "
        f"import gpt2rs; gpt2rs.GPT2.from_config({config}); print(*{{*sys.modules}} - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.split(".")[0] == "cuda" or ".cuda" in name]
