"""The checkpoint in each peer's own format, made once."""

import hashlib
import subprocess
from pathlib import Path

from checkpoint import write_once
from environments import Environment, Missing, reason
from peers import Peer

HERE = Path(__file__).parent


def digest(script: Path) -> str:
    """Of the program that writes a file: a changed program makes the file anew."""
    return hashlib.sha256(script.read_bytes()).hexdigest()


def converted(
    peer: Peer, variant: str, environment: Environment, checkpoint: Path, work: Path, checkpoint_id: str
) -> Path:
    """The folder where the peer finds its model. Raises Missing."""
    if not peer.converts:
        return checkpoint
    folder = work / "converted" / peer.name / variant
    log = work / "logs" / f"{peer.name}-{variant}-convert.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def convert() -> None:
        command = [
            str(environment.python),
            "-m",
            f"convert.{peer.name}",
            str(checkpoint),
            str(folder),
            variant,
        ]
        with log.open("w") as output:
            status = subprocess.run(command, cwd=HERE, stdout=output, stderr=subprocess.STDOUT).returncode
        if status != 0:
            raise Missing(f"could not be converted: {reason(log)} (all of it: {log})")

    made_from: dict[str, object] = {
        "checkpoint": checkpoint_id,
        "program": digest(HERE / "convert" / f"{peer.name}.py"),
        "version": environment.version,
    }
    write_once(folder, made_from, convert)
    return folder
