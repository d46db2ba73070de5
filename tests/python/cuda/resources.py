"""What each kernel takes of a multiprocessor, on each architecture, as one NVRTC compiles it.

    python tests/python/cuda/resources.py          shows what has changed since the table was written
    python tests/python/cuda/resources.py --write  writes the table anew

The table is `resources.tsv`; its first line names the NVRTC, a version of the package `nvidia-cuda-nvrtc`,
which must be the one installed: registers and spills differ from one compiler to the next.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, fields
from itertools import product
from pathlib import Path

from gpt2rs.cuda import compiler

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
TABLE = Path(__file__).with_name("resources.tsv")
PACKAGE = "nvidia-cuda-nvrtc"

# (source, kernel, architecture) -> registers a thread and so on, in the order of `compiler.Usage`.
Usages = dict[tuple[str, str, str], compiler.Usage]


def installed() -> str | None:
    """The version of NVRTC that is installed as a package."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def measured(archs: tuple[str, ...] = ARCHS) -> Usages:
    """Of the kernels as they are now."""
    pairs = list(product(compiler.package_sources(), archs))
    with ThreadPoolExecutor() as threads:
        usages = list(threads.map(lambda pair: compiler.usage(*pair), pairs))
    return {
        (source.name, kernel, arch): usage
        for (source, arch), kernels in zip(pairs, usages, strict=True)
        for kernel, usage in kernels.items()
    }


def held() -> tuple[str, Usages]:
    """The NVRTC that the table was written with, and the table."""
    first, _, *rows = TABLE.read_text(encoding="utf-8").splitlines()
    table = {}
    for row in rows:
        source, kernel, arch, *values = row.split("\t")
        table[source, kernel, arch] = compiler.Usage(*map(int, values))
    return first.rpartition(" ")[2], table


def write(usages: Usages, nvrtc: str) -> None:
    """Write the table."""
    names = [field.name for field in fields(compiler.Usage)]
    lines = [f"# {PACKAGE} {nvrtc}", "\t".join(["source", "kernel", "arch", *names])]
    order = {arch: i for i, arch in enumerate(ARCHS)}
    for (source, kernel, arch), usage in sorted(
        usages.items(), key=lambda item: (item[0][0], item[0][1], order[item[0][2]])
    ):
        lines.append("\t".join([source, kernel, arch, *map(str, astuple(usage))]))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def changes(before: Usages, now: Usages) -> list[str]:
    """A line for each kernel that is new, gone or other than it was."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            lines.append(f"{' '.join(key)}: {before.get(key)} -> {now.get(key)}")
    return lines


def main() -> int:
    """Show what has changed; 1 where something has."""
    parser = argparse.ArgumentParser(description="Registers, spills and static shared memory of the kernels.")
    parser.add_argument("--write", action="store_true", help="write the table anew")
    options = parser.parse_args()
    nvrtc = installed()
    if nvrtc is None:
        print(f"{PACKAGE} is not installed", file=sys.stderr)
        return 1
    now = measured()
    if options.write:
        write(now, nvrtc)
        return 0
    pinned, before = held()
    if pinned != nvrtc:
        print(f"the table is of {PACKAGE} {pinned}, and {nvrtc} is installed", file=sys.stderr)
        return 1
    found = changes(before, now)
    print("\n".join(found) or "no change")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
