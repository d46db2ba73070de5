"""Kernel sources -> machine code of one GPU architecture, by NVRTC, and kept on disk.

The result is a cubin, never PTX: a driver refuses PTX of a newer compiler, where it loads the cubin.  NVRTC
needs neither a GPU nor a driver, and the sources no header that is not beside them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from . import cache as disk

# Only what is written as one is a fused multiply-add, as in the host's build of the same source.
OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--device-as-default-execution-space",
)


@dataclass(frozen=True)
class Source:
    """A `.cu` file of the package, and the `.cuh` files that it may include, as (name, text)."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Compiled:
    """name: of the source.  cubin: an ELF file for one architecture.  log: what the compiler had to say."""

    name: str
    cubin: bytes
    log: str


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor: registers a thread, bytes of static shared memory a block
    (dynamic shared memory is asked for at the launch), and bytes a thread that lie in memory for want of
    registers."""

    registers: int
    static_smem: int
    stack: int
    spill_stores: int
    spill_loads: int


def package_sources() -> list[Source]:
    """The kernels that come with the package, by name."""
    folder = resources.files(__package__) / "kernels"
    texts = {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith((".cu", ".cuh"))
    }
    headers = tuple((name, text) for name, text in sorted(texts.items()) if name.endswith(".cuh"))
    return [Source(name, text, headers) for name, text in sorted(texts.items()) if name.endswith(".cu")]


def version() -> str:
    """The compiler's version, down to the build: "13.5 (141163664 bytes)"; RuntimeError without one."""
    nvrtc = _nvrtc()
    error, major, minor = nvrtc.nvrtcVersion()
    _check(error, "the compiler's version is unknown")
    return f"{major}.{minor} ({_library_size()} bytes)"


def architecture(major: int, minor: int) -> str:
    """What to compile for, for a GPU of this compute capability: its own architecture or, where the compiler
    is older than the GPU, the nearest one below that runs there, of the same major.

    RuntimeError where the compiler knows none.
    """
    nvrtc = _nvrtc()
    error, known = nvrtc.nvrtcGetSupportedArchs()
    _check(error, "the compiler's architectures are unknown")
    fitting = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise RuntimeError(
            f"the GPU is of architecture sm_{major}{minor}, which this NVRTC ({version()}) does not know: "
            "pip install --upgrade 'gpt2rs[cuda]'"
        )
    return f"sm_{max(fitting)}"


def build(sources: Sequence[Source], arch: str, options: Sequence[str] = ()) -> list[bytes]:
    """A cubin of each source, from the disk cache where it is there, else compiled, all at the same time."""
    compiler = version()

    def built(source: Source) -> bytes:
        key = cache_key(source, arch, options, compiler)
        code = disk.load(key)
        if code is None:
            code = compile_source(source, arch, options).cubin
            disk.store(key, code)
        return code

    if len(sources) < 2:
        return [built(source) for source in sources]
    with ThreadPoolExecutor(len(sources)) as threads:
        return list(threads.map(built, sources))


def cache_key(source: Source, arch: str, options: Sequence[str], compiler: str) -> str:
    """A name for what compiling gives: equal only if everything that goes into it is."""
    parts = [source.name, source.text, arch, compiler]
    for group in (OPTIONS, options, *source.headers):
        parts += [str(len(group)), *group]
    # Each with its length before it, so that no two lists of parts run together into the same text.
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()


def compile_source(source: Source, arch: str, options: Sequence[str] = ()) -> Compiled:
    """Compile for `arch`, such as "sm_90"; RuntimeError, with the first error, where the compiler refuses."""
    nvrtc = _nvrtc()
    error, program = nvrtc.nvrtcCreateProgram(
        source.text.encode(),
        source.name.encode(),
        len(source.headers),
        [text.encode() for _, text in source.headers],
        [name.encode() for name, _ in source.headers],
    )
    _check(error, f"{source.name} was not taken")
    try:
        given = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={arch}", *options)]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        if int(error) != 0:
            raise RuntimeError(
                f"{source.name} does not compile for {arch}: {_first_error(log) or _name(error)}"
            )
        return Compiled(source.name, _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def usage(source: Source, arch: str) -> dict[str, Usage]:
    """What each kernel of a source takes, by the assembler's own account; kernels by name."""
    log = compile_source(source, arch, ("--ptxas-options=-v",)).log
    return {match["kernel"]: _usage(match) for match in _ACCOUNT.finditer(log)}


_ACCOUNT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _usage(match: re.Match[str]) -> Usage:
    smem = re.search(r"(\d+) bytes smem", match["rest"])
    return Usage(
        registers=int(match["registers"]),
        static_smem=int(smem[1]) if smem else 0,
        stack=int(match["stack"]),
        spill_stores=int(match["spill_stores"]),
        spill_loads=int(match["spill_loads"]),
    )


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _library_size() -> int:
    """Of NVRTC: it tells builds apart that have the same version."""
    from pathlib import Path

    from cuda.pathfinder import load_nvidia_dynamic_lib

    path = load_nvidia_dynamic_lib("nvrtc").abs_path
    return 0 if path is None else Path(path).stat().st_size


def _check(error: Any, what: str) -> None:
    if int(error) != 0:
        raise RuntimeError(f"{what}: {_name(error)}")


def _name(error: Any) -> str:
    return str(getattr(error, "name", error))


def _bytes(size_of: Any, read: Any, program: Any) -> bytes:
    error, size = size_of(program)
    _check(error, "the compiler's output has no size")
    room = bytearray(size)
    (error,) = read(program, room)
    _check(error, "the compiler's output can't be read")
    return bytes(room)


def _text(size_of: Any, read: Any, program: Any) -> str:
    return _bytes(size_of, read, program).rstrip(b"\0").decode(errors="replace")


def _first_error(log: str) -> str:
    return next((line for line in log.splitlines() if "error" in line), "")
