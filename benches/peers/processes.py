"""The driver's side of a worker: start it, ask it, and keep it still while others run."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environments import reason
from workloads import FIRST_TOKEN, MEMORY

HERE = Path(__file__).parent


class WorkerError(Exception):
    """What a worker said before it gave up."""


class Worker:
    """A peer in a process of its own, stopped (SIGSTOP) except while it answers.

    Thread pools of some peers spin after their work is done; stopped, they take nothing from the next peer.
    """

    def __init__(
        self,
        python: Path,
        module: str,
        model: Path,
        variant: str,
        n_threads: int,
        log: Path,
        options: Sequence[str] = (),
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        command = [str(python), "-m", f"workers.{module}"]
        command += ["--model", str(model), "--variant", variant, "--threads", str(n_threads), *options]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=HERE,
                env={**os.environ, "OMP_NUM_THREADS": str(n_threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            # It ended; what it said about that is still to be read.
            return

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise WorkerError(f"ended with status {status}: {reason(self.log)} (all of it: {self.log})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def wait_until_ready(self) -> dict[str, Any]:
        """What it says of itself once it has loaded."""
        said = self.receive()
        self.process.send_signal(signal.SIGSTOP)
        return said

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.process.send_signal(signal.SIGCONT)
        self.send(request)
        answer = self.receive()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def peak_memory(self) -> int:
        """Bytes of physical memory at its highest, mapped files included."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def cold_start(
    python: Path, module: str, model: Path, variant: str, n_threads: int, log: Path, n_vocab: int
) -> tuple[float, int]:
    """Seconds from starting the interpreter to the first token, and the peak memory after a short text."""
    start = time.perf_counter()
    worker = Worker(python, module, model, variant, n_threads, log)
    try:
        worker.send(FIRST_TOKEN.request(n_vocab))
        worker.receive()
        worker.receive()
        seconds = time.perf_counter() - start
        worker.send(MEMORY.request(n_vocab))
        worker.receive()
        return seconds, worker.peak_memory()
    finally:
        worker.close()
