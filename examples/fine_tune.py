"""Fine-tune the built-in model, which knows Shakespeare alone, on another text.

python examples/fine_tune.py                # on Python's own help texts: a few minutes on two cores
python examples/fine_tune.py TEXT STEPS     # on a text of yours
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import gpt2rs
from gpt2rs.train import Evaluated, Event, Trainer, TrainSettings

PROMPT = "The class"


def show(event: Event) -> None:
    if isinstance(event, Evaluated):
        print(
            f"after step {event.step}: {event.val_loss_per_char:.3f} nats a character, held out", flush=True
        )


def sample(model: gpt2rs.GPT2) -> str:
    return PROMPT + model.generate(PROMPT, max_new_tokens=60, temperature=0.7, seed=2).text


with TemporaryDirectory() as folder:
    text = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "help.txt")
    if len(sys.argv) < 2:
        text.write_text("<|endoftext|>".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    settings = TrainSettings(
        data=text,
        out=Path(folder, "run"),
        cache_dir=Path(folder, "tokens"),
        init_from="shakespeare",
        n_ctx=128,  # of the model's 256 positions: shorter sequences are cheaper
        batch_size=8,
        steps=int(sys.argv[2]) if len(sys.argv) > 2 else 300,
        lr=1e-3,
        dropout=0.1,
        eval_every=50,
        eval_tokens=8_192,
        sample_every=0,
    )
    print("Before:", sample(gpt2rs.GPT2.from_pretrained("shakespeare")), sep="\n")
    Trainer(settings).fit([show])
    best = gpt2rs.GPT2.from_pretrained(Path(folder, "run", "best"))
    print("After:", sample(best), sep="\n")
