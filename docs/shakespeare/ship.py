"""Put a run of settings.toml into the package: python docs/shakespeare/ship.py RUN

Writes the best checkpoint, rounded to bfloat16, and training.json, which tells the run, over the built-in
model; and the run's picture beside this file.
"""

import json
import sys
from pathlib import Path

import gpt2rs
from gpt2rs.train.log import read_log
from gpt2rs.train.plot import draw
from gpt2rs.train.settings_file import read_settings

run, here = Path(sys.argv[1]), Path(__file__).parent
target = here.parents[1] / "python" / "gpt2rs" / "models" / "shakespeare"

gpt2rs.GPT2.from_pretrained(run / "best", dtype="bfloat16").save_pretrained(target)
draw(run, here / "loss.svg")

events = list(read_log(run / "log.jsonl"))
evaluated = [event for event in events if event["event"] == "evaluated"]
training = {
    "text": "tinyshakespeare.txt, first 90 % to train on, last 10 % held out",
    "command": "gpt2rs train --settings docs/shakespeare/settings.toml --data tinyshakespeare.txt --out RUN",
    "settings": read_settings(here / "settings.toml"),
    "best": next(event for event in reversed(evaluated) if event["best"]),
    "seconds": sum(event["seconds"] for event in events if event["event"] == "step"),
    "held_out": evaluated,
    "samples": [event for event in events if event["event"] == "sampled"],
}
(target / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
best = training["best"]
print(f"{target}: step {best['step']}, {best['val_loss_per_char']:.4f} nats a character")
