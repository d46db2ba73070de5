"""Training: GPT-2 from random weights or from a checkpoint, on the CPU, to the same bits every time.

    from gpt2rs.train import Trainer, TrainSettings
    Trainer(TrainSettings(data="text.txt", out="run", n_layer=6, n_embd=192, batch_size=12)).fit()

`import gpt2rs` does not load any of this.
"""

from .events import Accumulated, Callback, Evaluated, Event, Finished, Sampled, Saved, Started, Step
from .gradients import loss_and_grads
from .run import Diverged
from .settings import TrainSettings
from .trainer import Trainer

__all__ = [
    "Accumulated",
    "Callback",
    "Diverged",
    "Evaluated",
    "Event",
    "Finished",
    "Sampled",
    "Saved",
    "Started",
    "Step",
    "TrainSettings",
    "Trainer",
    "loss_and_grads",
]
