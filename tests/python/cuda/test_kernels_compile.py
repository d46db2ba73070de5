"""Every kernel compiles to machine code, without a GPU or a driver, and takes what the table says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import resources
from resources import ARCHS

from gpt2rs.cuda import compiler, sizes
from gpt2rs.cuda.compiler import Source

KERNELS = Path(compiler.__file__).parent / "kernels"
SMALL = Source(
    "small.cu",
    """
#include "add.cuh"
extern "C" __global__ void add(float* y, const float* x, int n) {
    __shared__ float held[32];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    held[threadIdx.x] = x[i];
    __syncthreads();
    if (i < n) y[i] = sum(y[i], held[threadIdx.x ^ 1] * 3.0f);
}
""",
    (("add.cuh", "__device__ inline float sum(float a, float b) { return a + b; }"),),
)


def has_nvrtc() -> bool:
    if importlib.util.find_spec("cuda") is None:
        return False
    try:
        compiler.version()
    except (ImportError, RuntimeError):
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed (gpt2rs[cuda])")


@needs_nvrtc
class TestNvrtc:
    @pytest.mark.parametrize("arch", ARCHS)
    def test_makes_an_elf_file_of_a_source_and_its_header(self, arch: str) -> None:
        compiled = compiler.compile_source(SMALL, arch)
        assert compiled.cubin.startswith(b"\x7fELF")
        assert b"add" in compiled.cubin
        # PTX is text, and would be there as such.
        assert b".version" not in compiled.cubin

    def test_tells_what_a_kernel_takes(self) -> None:
        usage = compiler.usage(SMALL, "sm_90")
        assert list(usage) == ["add"]
        assert usage["add"].static_smem == 128
        assert 8 <= usage["add"].registers <= 32
        assert (usage["add"].stack, usage["add"].spill_stores, usage["add"].spill_loads) == (0, 0, 0)

    def test_tells_of_spills(self) -> None:
        """A bound of 32 registers a thread, and 64 values that live at the same time."""
        lines = "".join(
            f"v{i} = v{i} * x[{i} * 1024 + threadIdx.x] + v{(7 * i + 1) % 64};" for i in range(64)
        )
        source = Source(
            "spilling.cu",
            'extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {'
            + "".join(f"float v{i} = x[threadIdx.x + {i}];" for i in range(64))
            + f"for (int j = 0; j < n; j++) {{ {lines} }}"
            + "".join(f"x[{i} * 2048 + threadIdx.x] = v{i};" for i in range(64))
            + "}",
            (),
        )
        usage = compiler.usage(source, "sm_90")["spilling"]
        assert usage.registers == 32
        assert usage.spill_stores > 0
        assert usage.spill_loads > 0
        assert usage.stack > 0

    def test_says_where_a_source_is_wrong(self) -> None:
        source = Source("wrong.cu", "int one = 1;\nint two = three;", ())
        message = r"^wrong\.cu does not compile for sm_90: wrong\.cu\(2\): error: .*three"
        with pytest.raises(RuntimeError, match=message):
            compiler.compile_source(source, "sm_90")

    def test_does_not_fuse_what_is_not_written_as_fused(self) -> None:
        """The host compiles the same source without contraction, and the two must round alike."""
        text = 'extern "C" __global__ void f(float* x) {{ x[0] = {}; }}'
        apart, fused = (
            compiler.compile_source(
                Source("f.cu", text.format(expression), ()), "sm_90", ("--dopt=on",)
            ).cubin
            for expression in ("x[1] * x[2] + x[3]", "fmaf(x[1], x[2], x[3])")
        )
        assert apart != fused

    def test_knows_this_package_s_architectures(self) -> None:
        for arch in ARCHS:
            major, minor = divmod(int(arch.removeprefix("sm_")), 10)
            assert compiler.architecture(major, minor) == arch

    def test_s_version_tells_builds_apart(self) -> None:
        version = compiler.version()
        assert version[0].isdigit()
        assert not version.endswith("(0 bytes)")


class TestSizes:
    """What Python makes grids and shared memory of is what the sources say."""

    @staticmethod
    def of_source(name: str) -> dict[str, str]:
        text = (KERNELS / name).read_text()
        declarations = re.findall(r"^constexpr \w+ ([^;]*);", text, re.MULTILINE)
        return dict(pair for line in declarations for pair in re.findall(r"(\w+) = ([^,]+)", line))

    @pytest.mark.parametrize(
        ("source", "where", "names"),
        [
            ("prim.cuh", sizes, ["WARP"]),
            ("rows.cuh", sizes, ["BLOCK", "MAX_PARTIALS"]),
            ("epilogue.cuh", sizes, ["POSITIONS"]),
            ("fragments.cuh", sizes, ["GROUP", "TILE"]),
            *(
                (source, where, [name for name in vars(where) if name.isupper()])
                for source, where in (
                    ("matmul.cu", sizes.Rows),
                    ("tiled.cu", sizes.Tiled),
                    ("float32.cu", sizes.Float32),
                    ("attention.cu", sizes.Attention),
                    ("sample.cu", sizes.Sample),
                )
            ),
        ],
    )
    def test_are_those_of_the_source(self, source: str, where: Any, names: list[str]) -> None:
        declared = self.of_source(source)
        assert names
        assert {name: str(getattr(where, name)) for name in names} == {name: declared[name] for name in names}

    def test_are_all_looked_at(self) -> None:
        plain = {name for name, value in vars(sizes).items() if isinstance(value, int)}
        assert plain == {"WARP", "BLOCK", "MAX_PARTIALS", "POSITIONS", "GROUP", "TILE"}


class TestSources:
    def test_are_those_of_the_folder(self) -> None:
        names = [source.name for source in compiler.package_sources()]
        assert names == sorted(path.name for path in KERNELS.glob("*.cu"))

    def test_bring_their_headers(self) -> None:
        for source in compiler.package_sources():
            assert [name for name, _ in source.headers] == sorted(path.name for path in KERNELS.glob("*.cuh"))


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", compiler.package_sources(), ids=lambda source: source.name)
def test_every_source_compiles_without_a_word(source: Source, arch: str) -> None:
    compiled = compiler.compile_source(source, arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert compiled.log == ""


class TestTable:
    pinned, table = resources.held()

    @pytest.mark.skipif(
        resources.installed() != pinned,
        reason=f"the table is of {resources.PACKAGE} {pinned}; installed: {resources.installed()}",
    )
    def test_is_what_the_kernels_take(self) -> None:
        changed = resources.changes(self.table, resources.measured())
        assert changed == [], "if that is meant: python tests/python/cuda/resources.py --write"

    def test_has_every_source_on_every_architecture(self) -> None:
        names = {source.name for source in compiler.package_sources()}
        assert {(source, arch) for source, _, arch in self.table} == {
            (name, arch) for name in names for arch in ARCHS
        }

    def test_shows_a_change(self) -> None:
        usage = compiler.Usage(32, 0, 0, 0, 0)
        before = {("k.cu", "same", "sm_90"): usage, ("k.cu", "gone", "sm_90"): usage}
        spilling = compiler.Usage(32, 0, 8, 4, 4)
        now = {("k.cu", "same", "sm_90"): spilling, ("k.cu", "new", "sm_90"): usage}
        lines = resources.changes(before, now)
        assert [line.partition(":")[0] for line in lines] == [
            "k.cu gone sm_90",
            "k.cu new sm_90",
            "k.cu same sm_90",
        ]
        assert "spill_stores=4" in lines[2]
