"""transformers' GPT-2 on PyTorch: eager, scaled_dot_product_attention, fused AdamW; bfloat16 is autocast."""

from collections.abc import Callable

import torch
from transformers import GPT2LMHeadModel

from workers import training


def load(task: training.Task) -> Callable[[], float]:
    torch.set_num_threads(task.n_threads)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel.from_pretrained(
        task.model, dtype=torch.float32, attn_implementation="sdpa", use_cache=False, **dropout
    ).train()
    if task.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    decays = {True: [], False: []}
    for parameter in model.parameters():
        decays[parameter.ndim > 1].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": training.WEIGHT_DECAY if yes else 0.0}
        for yes, parameters in decays.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.LR, betas=training.BETAS, eps=training.EPS, fused=True)
    inputs, targets = map(torch.tensor, task.ids(model.config.vocab_size))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bfloat16"):
            logits = model(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.MAX_NORM)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    training.serve(load)
