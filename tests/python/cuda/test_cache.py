"""Compiled kernels on disk: found again, told apart, rebuilt where damaged, and never in the way."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import pytest
from fakes import FakeNvrtc

from gpt2rs.cuda import cache, compiler
from gpt2rs.cuda.compiler import Source

SOURCE = Source("k.cu", "KERNEL(32, 1) one() {}", (("k.cuh", "int x;"),))


@pytest.fixture
def folder(nvrtc: FakeNvrtc) -> Path:
    found = cache.folder()
    assert found is not None
    return found


def build(source: Source = SOURCE, arch: str = "sm_90", options: tuple[str, ...] = ()) -> bytes:
    [code] = compiler.build([source], arch, options)
    return code


def test_a_kernel_is_compiled_once(nvrtc: FakeNvrtc, folder: Path) -> None:
    first = build()
    assert (build(), len(nvrtc.compiled)) == (first, 1)
    [entry] = folder.iterdir()
    assert entry.read_bytes().endswith(first)


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(SOURCE, text=SOURCE.text + " "),
        dataclasses.replace(SOURCE, name="l.cu"),
        dataclasses.replace(SOURCE, headers=(("k.cuh", "int y;"),)),
        dataclasses.replace(SOURCE, headers=(("l.cuh", "int x;"),)),
        dataclasses.replace(SOURCE, headers=()),
    ],
)
def test_another_source_is_another_entry(nvrtc: FakeNvrtc, changed: Source) -> None:
    build()
    build(changed)
    assert len(nvrtc.compiled) == 2


def test_so_is_another_architecture_option_or_compiler(
    nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    build(arch="sm_80")
    build(options=("-G",))
    build(options=("-", "G"))
    nvrtc.version = (13, 1)
    build()
    # The same version in another build: its library has another size.
    monkeypatch.setattr(compiler, "_library_size", lambda: 1)
    build()
    monkeypatch.setattr(compiler, "OPTIONS", ("--fmad=true",))
    build()
    assert len(nvrtc.compiled) == 7


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "gone", "folder"])
def test_a_damaged_entry_is_rebuilt(nvrtc: FakeNvrtc, folder: Path, damage: str) -> None:
    code = build()
    [entry] = folder.iterdir()
    data = entry.read_bytes()
    if damage in ("gone", "folder"):
        entry.unlink()
        if damage == "folder":
            entry.mkdir()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        entry.write_bytes({"flipped": flipped, "short": data[:-1], "empty": b""}[damage])
    assert (build(), len(nvrtc.compiled)) == (code, 2)
    if damage != "folder":
        assert entry.read_bytes() == data
    assert [path.name for path in folder.iterdir()] == [entry.name]


def test_a_folder_that_can_t_be_used_is_no_cache(
    nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2RS_CACHE_DIR", str(tmp_path / "file"))
    assert build() == build()
    assert len(nvrtc.compiled) == 2


def test_nor_is_one_without_permission(
    nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # who may write anywhere but there
        locked = Path("/sys/gpt2rs")
        with pytest.raises(OSError):
            locked.mkdir()
    monkeypatch.setenv("GPT2RS_CACHE_DIR", str(locked))
    assert build() == build()
    assert len(nvrtc.compiled) == 2


def test_a_full_disk_leaves_nothing_behind(
    nvrtc: FakeNvrtc, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    build()
    assert list(folder.iterdir()) == []


def test_processes_that_write_at_the_same_time_see_whole_files(folder: Path) -> None:
    codes = [bytes([i]) * 100_000 for i in range(4)]
    seen = set()

    def work(code: bytes) -> None:
        for _ in range(20):
            cache.store("key", code)
            seen.add(cache.load("key"))

    threads = [threading.Thread(target=work, args=(code,)) for code in codes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(codes)
    assert [path.name for path in folder.iterdir()] == ["key.cubin"]


class TestFolder:
    def test_is_what_the_variable_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("GPT2RS_CACHE_DIR", str(tmp_path))
        assert cache.folder() == tmp_path / "cubins"

    def test_is_the_user_s_cache_else(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("GPT2RS_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache.folder() == tmp_path / "gpt2rs" / "cubins"

    @pytest.mark.parametrize("xdg", ["", "relative"])
    def test_is_in_the_home_where_that_is_not_absolute(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xdg: str
    ) -> None:
        monkeypatch.delenv("GPT2RS_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache.folder() == tmp_path / ".cache" / "gpt2rs" / "cubins"

    def test_is_private(self, nvrtc: FakeNvrtc, folder: Path) -> None:
        build()
        assert folder.stat().st_mode & 0o077 == 0

    def test_may_be_nowhere(self, nvrtc: FakeNvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("GPT2RS_CACHE_DIR", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
        assert build() == build()


class TestCompiler:
    def test_s_refusal_is_an_error_with_its_first_line(self, nvrtc: FakeNvrtc) -> None:
        message = r"^k\.cu does not compile for sm_90: k\.cu\(1\): catastrophic error: #error directive$"
        with pytest.raises(RuntimeError, match=message):
            build(dataclasses.replace(SOURCE, text="#error"))

    @pytest.mark.parametrize(
        ("capability", "arch"), [((9, 0), "sm_90"), ((8, 6), "sm_80"), ((8, 9), "sm_89"), ((12, 1), "sm_120")]
    )
    def test_takes_the_nearest_architecture_below(
        self, nvrtc: FakeNvrtc, capability: tuple[int, int], arch: str
    ) -> None:
        assert compiler.architecture(*capability) == arch

    def test_builds_several_sources_in_their_order(self, nvrtc: FakeNvrtc) -> None:
        sources = [Source(f"{i}.cu", f"KERNEL(32, 1) kernel_{i}() {{}}", ()) for i in range(6)]
        codes = compiler.build(sources, "sm_90")
        assert [code.split()[1].decode() for code in codes] == [f"kernel_{i}" for i in range(6)]
