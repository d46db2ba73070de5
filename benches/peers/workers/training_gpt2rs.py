"""gpt2rs.train.Trainer, as a user drives it step by step."""

from collections.abc import Callable

import numpy as np

from gpt2rs.train import Trainer, TrainSettings
from workers import training


def load(task: training.Task) -> Callable[[], float]:
    settings = TrainSettings(
        init_from=task.model,
        tokenizer="none",
        batch_size=task.batch,
        n_ctx=task.tokens,
        lr=training.LR,
        min_lr=training.LR,
        warmup=0,
        betas=training.BETAS,
        eps=training.EPS,
        weight_decay=training.WEIGHT_DECAY,
        max_norm=training.MAX_NORM,
        precision=task.precision,
        recompute=task.recompute,
        n_threads=task.n_threads,
    )
    trainer = Trainer(settings)
    inputs, targets = map(np.array, task.ids(trainer.config.n_vocab))
    return lambda: trainer.step(inputs, targets).loss


if __name__ == "__main__":
    training.serve(load)
