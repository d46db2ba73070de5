"""What the machine can do at this moment, measured by gpt2rs's own probes."""

import json
import platform
import subprocess
from pathlib import Path

PROBE = """
import json, sys
from gpt2rs import _core
n = int(sys.argv[1])
print(json.dumps({"read_gb_per_s": _core.probe_bandwidth(n), "fma_gflop_per_s": _core.probe_fma(n)}))
"""


def probe(gpt2rs_python: Path, n_threads: int) -> dict[str, float] | str:
    """Read bandwidth (GB/s) and float32 FMA throughput (GFLOP/s) of `n_threads`, or why not."""
    command = [str(gpt2rs_python), "-c", PROBE, str(n_threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return "not measured: " + (done.stderr.strip().splitlines() or ["no output"])[-1]
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def describe() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "system": f"{platform.system()} {platform.release()}",
        "python": f"Python {platform.python_version()}",
    }
