"""What gpt2rs takes on disk: `python benches/peers/bare.py [--wheel WHEEL]`.

Installs it into a new virtual environment with nothing else in it, and says what each package takes there,
and which of them a process has imported that loads a local model and continues token ids. Without --wheel the
wheel is built from this checkout, which takes minutes and needs Rust.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoint import Shape, write_checkpoint
from report import MEGABYTE, print_table

HERE = Path(__file__).parent

# Run in the new environment: the packages that are imported once there is a text.
IMPORTED = """
import json, sys
from importlib.metadata import packages_distributions
import gpt2rs
gpt2rs.GPT2.from_pretrained(sys.argv[1]).generate([1, 2, 3], max_new_tokens=4, eos_token_id=None)
owners = packages_distributions()
modules = {name.partition(".")[0] for name in list(sys.modules)}
print(json.dumps(sorted({owner for module in modules for owner in owners.get(module, [])})))
"""


def output_of(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout


def build_wheel(folder: Path) -> Path:
    output_of(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, HERE.parent.parent)
    return next(folder.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help="of gpt2rs (default: built from this checkout)")
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = wheel or build_wheel(folder)
        output_of(sys.executable, "-m", "venv", folder / "venv")
        python = folder / "venv" / "bin" / "python"
        output_of(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
        write_checkpoint(folder / "model", Shape(n_vocab=1000, n_ctx=64, n_embd=64, n_layer=2, n_head=2))
        imported = json.loads(output_of(python, "-c", IMPORTED, folder / "model"))
        sizes = json.loads(output_of(python, HERE / "installed.py", "gpt2rs"))["bytes"]
    needed = {package.lower().replace("_", "-") for package in imported} & sizes.keys()
    rows = [
        (package, f"{size / MEGABYTE:.1f}", "yes" if package in needed else "")
        for package, size in sorted(sizes.items(), key=lambda item: -item[1])
    ]
    for title, names in (("all", sizes.keys()), ("imported", needed)):
        total = sum(sizes[name] for name in names)
        rows.append((title, f"{total / MEGABYTE:.1f}", f"{100 * sizes['numpy'] / total:.0f} % NumPy"))
    print_table(("package", "MB", "imported for a local model and token ids"), rows)


if __name__ == "__main__":
    main()
