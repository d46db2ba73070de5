"""gpt2rs training GPT-2 124M beside PyTorch: tokens/s, part of the machine's limit, ratios, losses, memory.

    python benches/peers/train.py --pytorch PYTHON

PYTHON is an interpreter that has torch and transformers.  Both learn from the same random checkpoint and
tokens, a step being forward, backward, clipping and AdamW.  They take turns, a step each, and whoever waits
is stopped (SIGSTOP).  A ratio is taken within a round, between two steps that follow one another.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import machine
from checkpoint import prepared
from processes import Worker, WorkerError
from report import print_table, ratios, spread

import gpt2rs
from gpt2rs.train.cost import flops_per_token

HERE = Path(__file__).parent
BATCHES = ((4, 64), (1, 1024), (4, 1024))
PRECISIONS = ("float32", "bfloat16")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pytorch", metavar="PYTHON", type=Path, help="the interpreter that has torch and transformers")
    add("--threads", metavar="N", type=int, default=2)
    add("--rounds", metavar="N", type=int, default=5)
    add("--precision", choices=PRECISIONS, help="one alone")
    add("--recompute", action="store_true", help="activations are computed again, for less memory")
    add("--work", metavar="DIR", type=Path, default=HERE / ".work", help="where the checkpoint is kept")
    return parser.parse_args()


def measure(
    arguments: argparse.Namespace, checkpoint: Path, precision: str, batch: int, tokens: int
) -> list[tuple[str, ...]]:
    """Rows of the table: gpt2rs, and PyTorch if there is one."""
    pythons = {"gpt2rs": Path(sys.executable)}
    if arguments.pytorch:
        pythons["pytorch"] = arguments.pytorch.absolute()
    options = ["--batch", str(batch), "--tokens", str(tokens)]
    options += ["--recompute"] * arguments.recompute
    workers, seconds, losses = {}, {name: [] for name in pythons}, {name: [] for name in pythons}
    limits = []
    try:
        for name, python in pythons.items():
            log = arguments.work / "logs" / f"training-{name}-{precision}-{batch}x{tokens}.log"
            workers[name] = Worker(
                python, f"training_{name}", checkpoint, precision, arguments.threads, log, options
            )
            workers[name].wait_until_ready()
        # Two rounds warm up, in which memory is touched for the first time.
        for turn in range(arguments.rounds + 2):
            probe = machine.probe(
                Path(sys.executable), {"peak": machine.ARITHMETIC[precision]}, arguments.threads
            )
            for name in list(pythons) if turn % 2 else reversed(pythons):
                answer = workers[name].ask({})
                losses[name].append(answer["loss"])
                if turn > 1:
                    seconds[name].append(answer["seconds"])
            if turn > 1:
                if isinstance(probe, str):
                    raise WorkerError(f"the peak was {probe}")
                limits.append(probe["peak"])
        peaks = {name: worker.peak_memory() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for name in pythons:
        flops = batch * tokens * flops_per_token(gpt2rs.Config.preset("gpt2"), tokens)
        shares = [100 * flops / s / 1e9 / limit for s, limit in zip(seconds[name], limits, strict=True)]
        rows.append(
            (
                f"{batch} x {tokens} {precision}, {'PyTorch' if name == 'pytorch' else name}",
                spread([batch * tokens / s for s in seconds[name]], 0),
                f"{median(shares):.0f} %",
                "" if name == "gpt2rs" else ratios(seconds[name], seconds["gpt2rs"]),
                f"{losses[name][0]:.5f}, {losses[name][-1]:.5f}",
                f"{peaks[name] / 2**30:.2f}",
            )
        )
    return rows


def main() -> int:
    arguments = parse_arguments()
    arguments.work = arguments.work.absolute()
    checkpoint, _ = prepared(arguments.work)
    print(", ".join([time.strftime("%Y-%m-%d %H:%M"), *machine.describe().values()]))
    print(f"{arguments.threads} threads, {arguments.rounds} rounds; median (minimum, maximum)")
    rows, failed = [], False
    for precision in [arguments.precision] if arguments.precision else PRECISIONS:
        for batch, tokens in BATCHES:
            try:
                rows += measure(arguments, checkpoint, precision, batch, tokens)
            except WorkerError as why:
                print(f"{batch} x {tokens} {precision}: {why}", file=sys.stderr)
                failed = True
    print_table(
        ("B x T", "tokens/s", "of the peak", "gpt2rs/row", "first and last loss", "peak memory, GiB"), rows
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
