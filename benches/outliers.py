"""A copy of a model that computes the same with outlier channels, as published GPT-2 models have them.

    python benches/outliers.py shakespeare shakespeare-outliers

A share of the channels that leave `ln_1` and `ln_2` is scaled by a factor, gain and bias, and the rows of
`c_attn` and `c_fc` that take them are divided by it: in exact arithmetic nothing changes.  Dettmers et al.
2022, "LLM.int8()", describes such channels and what they do to a quantised model; Xiao et al. 2022,
"SmoothQuant", has the same identity, and uses it to take them away.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import gpt2rs


def save_with_outliers(
    name_or_path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    share: float = 0.01,
    factor: float = 30.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """Write the copy, in float32, as a Hugging Face folder; returns the channels of each LayerNorm in turn.

    share: of the C channels, 1 at least; which ones is drawn anew for each LayerNorm, from `seed`.
    """
    model = gpt2rs.GPT2.from_pretrained(name_or_path, dtype="float32")
    model.save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    names = {name.removeprefix("transformer."): name for name in tensors}
    generator = np.random.default_rng(seed)
    n_embd = model.config.n_embd
    drawn = []
    for layer in range(model.config.n_layer):
        for norm, matrix in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            channels = generator.choice(n_embd, size=max(1, round(share * n_embd)), replace=False)
            scale = np.ones(n_embd, np.float32)
            scale[channels] = factor
            for part in ("weight", "bias"):
                tensors[names[f"h.{layer}.{norm}.{part}"]] *= scale
            # (in, out): a row takes one channel.
            tensors[names[f"h.{layer}.{matrix}.weight"]] /= scale[:, None]
            drawn.append(channels)
    save_file(tensors, file, metadata={"format": "pt"})
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, file or hub name")
    parser.add_argument("folder", help="where the copy goes")
    parser.add_argument("--share", type=float, default=0.01, help="of the channels; 1 channel at least")
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    drawn = save_with_outliers(
        arguments.model,
        arguments.folder,
        share=arguments.share,
        factor=arguments.factor,
        seed=arguments.seed,
    )
    print(f"{arguments.folder}: {sum(map(len, drawn))} outlier channels in {len(drawn)} LayerNorms")


if __name__ == "__main__":
    main()
