"""One virtual environment a peer, made once; and what is in it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peers import GPT2RS, Peer

HERE = Path(__file__).parent


class Missing(Exception):
    """A peer that can't run here, with the reason."""


@dataclass(frozen=True)
class Environment:
    """An interpreter that has the peer; `installed_bytes` is the peer with all that it requires, of which
    NumPy takes `numpy_bytes`.
    """

    python: Path
    version: str
    installed_bytes: int
    numpy_bytes: int


def prepare(peer: Peer, work: Path, gpt2rs_python: Path, with_torch: bool) -> Environment:
    """The environment of a peer, made if need be. Raises Missing."""
    if peer is GPT2RS:
        return describe(peer, gpt2rs_python)
    if peer.name == "transformers" and not with_torch:
        if can_import(gpt2rs_python, ("torch", "transformers")):
            return describe(peer, gpt2rs_python)
        raise Missing("not installed (--with-torch installs it)")
    return describe(peer, make(peer, work))


def make(peer: Peer, work: Path) -> Path:
    folder = work / "environments" / peer.name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.json"
    wanted = [*peer.requirements, *peer.conversion_requirements]
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    log = work / "logs" / f"{peer.name}-install.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *wanted]
    if peer.build_from_source:
        install += ["--no-binary", peer.distribution]
        print(f"{peer.title}: installing, built from source (minutes)", file=sys.stderr)
    else:
        print(f"{peer.title}: installing", file=sys.stderr)
    with log.open("w") as output:
        for command in ([sys.executable, "-m", "venv", str(folder)], install):
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **peer.build_variables}
            ).returncode
            if status != 0:
                raise Missing(f"could not be installed: {reason(log)} (all of it: {log})")
    stamp.write_text(json.dumps(wanted) + "\n")
    return python


def reason(log: Path) -> str:
    """The line of a program's messages that says most: its last error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    # A message in a frame ends with the frame.
    worded = [line.strip("│ ") for line in lines if any(letter.isalnum() for letter in line)]
    return (errors or worded or ["no output"])[-1]


def can_import(python: Path, modules: tuple[str, ...]) -> bool:
    find = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    return subprocess.run([str(python), "-c", find, *modules], capture_output=True).returncode == 0


def describe(peer: Peer, python: Path) -> Environment:
    command = [str(python), str(HERE / "installed.py"), peer.distribution, *peer.requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise Missing(f"not found by {python}: {last[0]}")
    found = json.loads(done.stdout)
    return Environment(python, found["version"], sum(found["bytes"].values()), found["bytes"].get("numpy", 0))
