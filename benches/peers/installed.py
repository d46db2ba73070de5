"""`PYTHON installed.py DISTRIBUTION...`: how much is installed for them, in the interpreter that runs this.

Prints one JSON line: the version of the first, and the bytes of each of all that they require, by name.
Optional extras, pip and setuptools do not count; a file that two claim counts for the first.
"""

import importlib.util
import json
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

UNCOUNTED = {"pip", "setuptools"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, found: dict[str, Distribution]) -> None:
    """Gather the distribution and what it requires; a requirement whose marker is false is not installed."""
    if normalised(name) in found | dict.fromkeys(UNCOUNTED):
        return
    found[normalised(name)] = distribution(name)
    for requirement in found[normalised(name)].requires or []:
        wanted, _, marker = requirement.partition(";")
        required = re.match(r"\s*([A-Za-z0-9._-]+)", wanted)
        if "extra" in marker or required is None:
            continue
        try:
            closure(required.group(1), found)
        except PackageNotFoundError:
            continue


def files(package: Distribution) -> set[Path]:
    paths = {Path(str(package.locate_file(file))).resolve() for file in package.files or []}
    # An editable install lists only the link to its sources.
    link = json.loads(package.read_text("direct_url.json") or "{}")
    if link.get("dir_info", {}).get("editable"):
        spec = importlib.util.find_spec(package.metadata["Name"].replace("-", "_"))
        for folder in spec.submodule_search_locations or [] if spec else []:
            paths |= {path.resolve() for path in Path(folder).rglob("*")}
    return {path for path in paths if path.is_file()}


if __name__ == "__main__":
    packages: dict[str, Distribution] = {}
    for name in sys.argv[1:]:
        closure(name, packages)
    counted: set[Path] = set()
    sizes = {}
    for name, package in packages.items():
        own = files(package) - counted
        counted |= own
        sizes[name] = sum(path.stat().st_size for path in own)
    print(json.dumps({"version": packages[normalised(sys.argv[1])].version, "bytes": sizes}))
