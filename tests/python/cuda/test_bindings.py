"""The fake driver against the true one: what tests run over must have the functions that cuda-python has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from fakes import FakeNvrtc

import gpt2rs.cuda

PACKAGE = Path(gpt2rs.cuda.__file__).parent
FAKES: dict[str, Any] = {"driver": FakeDriver, "nvrtc": FakeNvrtc}


def called(module: str) -> set[str]:
    """The functions, classes and constants of cuda-python that the package names."""
    pattern = {"driver": r"cu[A-Z]|CU[a-z]|cuuint|CU_MEMHOST", "nvrtc": r"nvrtc[A-Z]"}[module]
    return {
        node.attr
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and re.match(pattern, node.attr)
    }


@pytest.mark.parametrize("module", FAKES)
def test_the_fake_has_what_the_package_calls(module: str) -> None:
    names = called(module)
    assert len(names) >= 5
    assert {name for name in names if not hasattr(FAKES[module], name)} == set()


@pytest.mark.parametrize("module", FAKES)
def test_cuda_python_has_what_the_fake_has(module: str) -> None:
    true = getattr(pytest.importorskip(f"cuda.bindings.{module}"), "__dict__", {})
    fake = FAKES[module]
    for name, member in vars(fake).items():
        if name.startswith("_") or not name.lower().startswith(("cu", "nvrtc")):
            continue
        assert name in true, name
        if inspect.isfunction(member):
            given = list(inspect.signature(member).parameters)[1:]
            assert len(given) == len(inspect.signature(true[name]).parameters), name
        elif isinstance(member, type) and hasattr(member, "__members__"):
            values = {key: int(value) for key, value in member.__members__.items()}
            assert values == {key: int(getattr(true[name], key)) for key in values}, name
        elif isinstance(member, int):
            assert member == int(true[name]), name


def test_cuda_python_takes_what_is_filled_in() -> None:
    """Structures: a wrong name of a field is an error that no fake would show."""
    cu = pytest.importorskip("cuda.bindings.driver")
    pool = cu.CUmemPoolProps()
    pool.allocType = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    pool.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    pool.location.id = 3
    assert (int(pool.location.type), pool.location.id) == (1, 3)
    assert int(cu.cuuint64_t(2**64 - 1)) == 2**64 - 1
    config, attribute = cu.CUlaunchConfig(), cu.CUlaunchAttribute()
    attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = 4, 5, 6
    config.sharedMemBytes, config.hStream = 1000, cu.CUstream(7)
    config.attrs, config.numAttrs = [attribute], 1
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    assert (config.gridDimY, int(config.hStream)) == (5, 7)
