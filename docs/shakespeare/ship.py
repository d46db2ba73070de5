"""Put a run of settings.toml into the package: python docs/shakespeare/ship.py RUN

Writes the best checkpoint, rounded to bfloat16, and training.json, which tells the run, over the built-in
model; and the run's picture beside this file.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize_file
from safetensors.numpy import load_file

from gpt2rs.train.log import read_log
from gpt2rs.train.plot import draw
from gpt2rs.train.settings_file import read_settings

run, here = Path(sys.argv[1]), Path(__file__).parent
target = here.parents[1] / "python" / "gpt2rs" / "models" / "shakespeare"


def rounded(tensor: np.ndarray) -> np.ndarray:
    """The bits of a float32 tensor's nearest bfloat16, ties to even."""
    bits = tensor.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


tensors = {name: rounded(tensor) for name, tensor in load_file(run / "best" / "model.safetensors").items()}
specs = {
    name: TensorSpec(dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)
    for name, bits in tensors.items()
}
file = target / "model.safetensors"
serialize_file(specs, file, metadata={"format": "pt"})
file.chmod(0o644)
config = json.loads((run / "best" / "config.json").read_text(encoding="utf-8")) | {"torch_dtype": "bfloat16"}
(target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
draw(run, here / "loss.svg")

events = list(read_log(run / "log.jsonl"))
evaluated = [event for event in events if event["event"] == "evaluated"]
settings = "docs/shakespeare/settings.toml"
training = {
    "text": "tinyshakespeare.txt, first 90 % to train on, last 10 % held out",
    "command": f"gpt2rs train --settings {settings} --data tinyshakespeare.txt --out retrained",
    "settings": read_settings(here / "settings.toml"),
    "best": next(event for event in reversed(evaluated) if event["best"]),
    "seconds": sum(event["seconds"] for event in events if event["event"] == "step"),
    "held_out": evaluated,
    "samples": [event for event in events if event["event"] == "sampled"],
}
(target / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
best = training["best"]
print(f"{target}: step {best['step']}, {best['val_loss_per_char']:.4f} nats a character")
