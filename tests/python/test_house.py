"""What holds for the package as a whole: what importing it loads, what it ships, what it calls itself."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import gpt2rs
from gpt2rs import _core

ROOT = Path(__file__).parents[2]
PACKAGE = Path(str(importlib.resources.files("gpt2rs")))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def modules_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


class TestImport:
    def test_loads_numpy_and_the_core_and_nothing_else(self) -> None:
        beyond_numpy = modules_after("import gpt2rs") - modules_after("import numpy")
        packages = {name.partition(".")[0] for name in beyond_numpy} - set(sys.stdlib_module_names)
        assert packages == {"gpt2rs"}

    def test_leaves_formats_bench_and_command_line_for_when_they_are_used(self) -> None:
        loaded = modules_after("import gpt2rs")
        later = ("gpt2rs.checkpoints", "gpt2rs.formats", "gpt2rs.tokenizer", "gpt2rs.bench", "gpt2rs.cli")
        assert [name for name in later if name in loaded] == []

    def test_the_command_line_adds_typer_alone(self) -> None:
        loaded = modules_after("import gpt2rs.cli")
        assert "typer" in loaded
        assert not loaded & {"tiktoken", "huggingface_hub", "regex", "requests", "httpx"}


class TestPublicNames:
    def test_are_those_of_all(self) -> None:
        public = {
            name
            for name, value in vars(gpt2rs).items()
            if not isinstance(value, types.ModuleType) and (not name.startswith("_") or name == "__version__")
        }
        assert public == set(gpt2rs.__all__)

    @pytest.mark.parametrize("name", [name for name in gpt2rs.__all__ if name != "__version__"])
    def test_say_what_they_are(self, name: str) -> None:
        thing = getattr(gpt2rs, name)
        assert inspect.getdoc(thing)
        members = [member for member in vars(thing) if not member.startswith("_")]
        # A dataclass documents its fields together.
        fields = set(getattr(thing, "__dataclass_fields__", ()))
        silent = [
            member
            for member in members
            if member not in fields and not inspect.getdoc(getattr(thing, member))
        ]
        assert silent == []


class TestStub:
    """The stub names what the compiled module has; mypy's stubtest looks at the signatures besides."""

    tree = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8"))

    def test_names_the_module_s_names(self) -> None:
        told = {node.name for node in self.tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        told |= {
            node.target.id for node in self.tree.body if isinstance(node, ast.AnnAssign) and is_name(node)
        }
        assert told == {name for name in vars(_core) if name == "__version__" or not name.startswith("_")}

    def test_names_the_members_of_every_class(self) -> None:
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef):
                told = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                there = {name for name in vars(getattr(_core, node.name)) if not name.startswith("_")}
                assert {name for name in told if not name.startswith("_")} == there, node.name


def is_name(node: ast.AnnAssign) -> bool:
    return isinstance(node.target, ast.Name)


class TestPackage:
    def test_ships_its_types(self) -> None:
        assert (PACKAGE / "py.typed").is_file()
        assert (PACKAGE / "_core.pyi").is_file()

    def test_ships_the_built_in_model(self) -> None:
        model = PACKAGE / "models" / "shakespeare"
        for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt", "training.json"):
            assert (model / name).is_file(), name
        size = (model / "model.safetensors").stat().st_size
        # 2 bytes a parameter, that is bfloat16, and the header.
        n_parameters = gpt2rs.GPT2.from_pretrained("shakespeare").num_parameters()
        assert 2 * n_parameters < size < 2 * n_parameters + 100_000

    def test_has_one_version(self) -> None:
        written = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
        assert written is not None
        assert gpt2rs.__version__ == written[1]
        assert importlib.metadata.version("gpt2rs") == written[1]
        # Nowhere else to be forgotten: pyproject.toml takes it from Cargo.toml.
        assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()

    def test_has_its_licence(self) -> None:
        assert importlib.metadata.metadata("gpt2rs")["License-Expression"] == "MIT"
        assert (ROOT / "LICENSE").read_text().startswith("MIT License")

    def test_offers_the_command(self) -> None:
        (script,) = importlib.metadata.entry_points(group="console_scripts", name="gpt2rs")
        assert script.value == "gpt2rs.cli:main"
        command = Path(sys.executable).with_name("gpt2rs")
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"gpt2rs {gpt2rs.__version__}\n"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, example],
        input="ROMEO:\nWhat is thy name?\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= 2


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
