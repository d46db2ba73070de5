"""The checkpoint in each peer's own format, made once."""

import shutil
import subprocess
from pathlib import Path

from checkpoint import digest, write_once
from environments import Environment, Missing, reason
from peers import Peer

HERE = Path(__file__).parent


def converted(
    peer: Peer, variant: str, environment: Environment, checkpoint: Path, work: Path, checkpoint_id: str
) -> Path:
    """The folder where the peer finds its model. Raises Missing."""
    folder = work / "converted" / peer.name / variant
    if variant in peer.packs:
        return packed(variant, environment, checkpoint, folder, work, checkpoint_id)
    if not peer.converts:
        return checkpoint
    arguments = ["-m", f"convert.{peer.name}", str(checkpoint), str(folder), variant]
    made_from: dict[str, object] = {
        "checkpoint": checkpoint_id,
        "program": digest(HERE / "convert" / f"{peer.name}.py"),
        "version": environment.version,
    }
    log = work / "logs" / f"{peer.name}-{variant}-convert.log"
    write_once(folder, made_from, lambda: convert(environment, arguments, log))
    return folder


def packed(
    dtype: str, environment: Environment, checkpoint: Path, folder: Path, work: Path, checkpoint_id: str
) -> Path:
    """What `gpt2rs convert` writes, made anew with each build of gpt2rs."""
    target = folder / "packed"

    def write() -> None:
        shutil.rmtree(target, ignore_errors=True)
        arguments = ["-m", "gpt2rs.cli", "convert", str(checkpoint), str(target), "--dtype", dtype]
        convert(environment, arguments, work / "logs" / f"gpt2rs-{dtype}-convert.log")

    find = "import gpt2rs._core; print(gpt2rs._core.__file__)"
    found = subprocess.run([str(environment.python), "-c", find], capture_output=True, text=True)
    if found.returncode != 0:
        raise Missing(f"can't be imported: {found.stderr.strip().splitlines()[-1]}")
    write_once(folder, {"checkpoint": checkpoint_id, "build": digest(Path(found.stdout.strip()))}, write)
    return target


def convert(environment: Environment, arguments: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(environment.python), *arguments]
    with log.open("w") as output:
        status = subprocess.run(command, cwd=HERE, stdout=output, stderr=subprocess.STDOUT).returncode
    if status != 0:
        raise Missing(f"could not be converted: {reason(log)} (all of it: {log})")
