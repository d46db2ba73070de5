"""What the machine can do at this moment, measured by gpt2rs's own probes."""

import json
import platform
import subprocess
from pathlib import Path

# What limits a decode: read bandwidth, GB/s.
READING = {"read": "probe_bandwidth"}
# What limits a prefill, by what is multiplied: GFLOP/s, of int8 GOP/s. Those that the core has are measured.
ARITHMETIC = {"float32": "probe_fma", "bfloat16": "probe_dot_bf16", "int8": "probe_dot_int8"}

PROBE = """
import json, sys
from gpt2rs import _core
probes, n = json.loads(sys.argv[1]), int(sys.argv[2])
found = {limit: getattr(_core, name, None) for limit, name in probes.items()}
print(json.dumps({limit: probe(n) for limit, probe in found.items() if probe}))
"""


def probe(gpt2rs_python: Path, probes: dict[str, str], n_threads: int) -> dict[str, float] | str:
    """Those of the limits that the core can measure, of `n_threads`; or why not."""
    command = [str(gpt2rs_python), "-c", PROBE, json.dumps(probes), str(n_threads)]
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
