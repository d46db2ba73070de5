"""A stand-in of `_core.Trainer` in NumPy, which learns by wte and wpe alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt2rs import _core

KINDS = ("weight", "grad", "exp_avg", "exp_avg_sq")


class Trainer:
    def __init__(
        self,
        config,
        weights,
        *,
        batch_size,
        n_tokens,
        seed,
        dropout=0.0,
        precision="float32",
        recompute=False,
        n_threads=None,
    ):
        self.config, self.n_threads = config, n_threads or 1
        self.batch_size, self.n_tokens, self.seed, self.dropout = batch_size, n_tokens, seed, dropout
        self.arrays = {"weight": weights}
        for kind in KINDS[1:]:
            self.arrays[kind] = {name: np.zeros_like(w) for name, w in weights.items()}

    @staticmethod
    def random(config, *, bias="all", seed, **options):
        rng = np.random.Generator(np.random.Philox(seed))
        c, f = config.n_embd, config.n_inner
        shapes = {"wte.weight": (config.n_vocab, c), "wpe.weight": (config.n_ctx, c)}
        for i in range(config.n_layer):
            shapes |= {
                f"h.{i}.ln_1.weight": (c,),
                f"h.{i}.attn.c_attn.weight": (c, 3 * c),
                f"h.{i}.attn.c_proj.weight": (c, c),
                f"h.{i}.ln_2.weight": (c,),
                f"h.{i}.mlp.c_fc.weight": (c, f),
                f"h.{i}.mlp.c_proj.weight": (f, c),
            }
        shapes["ln_f.weight"] = (c,)
        if not config.tie_word_embeddings:
            shapes["lm_head.weight"] = (config.n_vocab, c)
        weights = {}
        for name, shape in shapes.items():
            weights[name] = (0.02 * rng.normal(size=shape)).astype(np.float32)
            if ".ln" in name or name.startswith("ln"):
                weights[name][:] = 1
        return Trainer(config, weights, seed=seed, **options)

    @staticmethod
    def load(config, checkpoint, *, seed, **options):
        trainer = Trainer.random(config, seed=seed, **options)
        model = _core.Model.load(config, checkpoint, dtype="float32")
        import tempfile
        from pathlib import Path

        from safetensors import safe_open

        with tempfile.TemporaryDirectory() as folder:
            model.save_safetensors(str(Path(folder) / "x.safetensors"))
            with safe_open(Path(folder) / "x.safetensors", framework="numpy") as file:
                for name in trainer.names():
                    trainer.arrays["weight"][name][:] = file.get_tensor("transformer." + name)
        return trainer

    @property
    def memory_plan(self):
        return [(kind, sum(a.nbytes for a in arrays.values())) for kind, arrays in self.arrays.items()]

    def names(self):
        return list(self.arrays["weight"])

    def shape(self, name):
        return list(self.arrays["weight"][name].shape)

    def tensor(self, kind, name):
        return self.arrays[kind][name].copy()

    def set_tensor(self, kind, name, array):
        self.arrays[kind][name][:] = array

    def _forward(self, inputs, targets, mask):
        if max(inputs.max(), targets.max()) >= self.config.n_vocab:
            raise ValueError("an id is out of range")
        assert inputs.flags.c_contiguous and inputs.dtype == np.uint32
        w = self.arrays["weight"]
        h = (w["wte.weight"][inputs] + w["wpe.weight"][: inputs.shape[1]]) * mask
        with np.errstate(all="ignore"):
            logits = (h @ w["wte.weight"].T).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        loss = -np.take_along_axis(logp, targets[..., None].astype(int), -1).mean()
        return h, logp, float(loss)

    def loss(self, inputs, targets):
        return self._forward(inputs, targets, np.float32(1))[2]

    def accumulate(self, inputs, targets, *, step, micro_step, scale):
        assert len(inputs) <= self.batch_size and inputs.shape[1] <= self.n_tokens
        mask = np.float32(1)
        if self.dropout:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, step * 1000 + micro_step]))
            shape = (*inputs.shape, self.config.n_embd)
            mask = ((rng.random(shape) >= self.dropout) / (1 - self.dropout)).astype(np.float32)
        h, logp, loss = self._forward(inputs, targets, mask)
        d = np.exp(logp)
        np.put_along_axis(
            d,
            targets[..., None].astype(int),
            np.take_along_axis(d, targets[..., None].astype(int), -1) - 1,
            -1,
        )
        d = (d * (scale / inputs.size)).astype(np.float32)
        grads, w = self.arrays["grad"], self.arrays["weight"]
        grads["wte.weight"] += np.einsum("btv,btc->vc", d, h)
        dh = (d @ w["wte.weight"]) * mask
        np.add.at(grads["wte.weight"], inputs, dh)
        grads["wpe.weight"][: inputs.shape[1]] += dh.sum(0)
        return loss

    def update(self, *, lr, step, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_norm=1.0):
        norm = float(
            np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in self.arrays["grad"].values()))
        )
        clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        with np.errstate(all="ignore"):
            for name, w in self.arrays["weight"].items():
                g = self.arrays["grad"][name] * np.float32(clip)
                m, v = self.arrays["exp_avg"][name], self.arrays["exp_avg_sq"][name]
                m += (g - m) * np.float32(1 - betas[0])
                v += (g * g - v) * np.float32(1 - betas[1])
                if w.ndim == 2:
                    w *= np.float32(1 - lr * weight_decay)
                w -= (
                    np.float32(lr / (1 - betas[0] ** step))
                    * m
                    / (np.sqrt(v / np.float32(1 - betas[1] ** step)) + np.float32(eps))
                )
        self.zero_grad()
        return norm

    def zero_grad(self):
        for g in self.arrays["grad"].values():
            g[:] = 0

    def model(self, dtype="float32"):
        checkpoint = _core.Checkpoint()
        for name, array in self.arrays["weight"].items():
            checkpoint.add_array(name, array)
        return _core.Model.load(self.config, checkpoint, dtype=dtype)


def install() -> None:
    """Put it in the core's place where that has none."""
    if not hasattr(_core, "Trainer"):
        target: Any = _core
        target.Trainer = Trainer
