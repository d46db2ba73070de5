"""gpt2rs beside its peers: the same random 124M GPT-2, the same work, in turns, in one run.

README.md tells what is measured and how. Exit status 1: a float32 text is wrong, or nothing could run.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import machine
import report
from checkpoint import SEED, Shape, write_checkpoint, write_once
from conversions import converted, digest
from environments import Environment, Missing, prepare
from peers import DTYPES, PEERS
from side_by_side import Course, Entry, SideBySide
from workloads import QUICK, WORKLOADS

HERE = Path(__file__).parent
SHAPE = Shape()


def one_or_more_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    peers, workloads = tuple(PEERS), tuple(WORKLOADS)
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    add = parser.add_argument
    add("--only", metavar="PEER,...", type=one_or_more_of(peers), default=peers, help=", ".join(peers))
    add("--quick", action="store_true", help="fewer workloads and repeats: a few minutes")
    add("--workloads", metavar="NAME,...", type=one_or_more_of(workloads), help=", ".join(workloads))
    add("--threads", metavar="N", type=count, default=2, help="of every peer (default 2)")
    add(
        "--dtype",
        metavar="DTYPE,...",
        type=one_or_more_of(DTYPES),
        default=("float32",),
        help=", ".join(DTYPES) + " (default float32)",
    )
    add("--repeat", metavar="N", type=count, help="timed rounds (default 5, with --quick 3)")
    add("--json", metavar="OUT", type=Path, help="write every single figure to this file")
    add(
        "--gpt2rs-python",
        metavar="PYTHON",
        type=Path,
        default=Path(sys.executable),
        help="the interpreter that has gpt2rs (default: this one)",
    )
    add("--with-torch", action="store_true", help="install torch and transformers (large)")
    add(
        "--work",
        metavar="DIR",
        type=Path,
        default=HERE / ".work",
        help="environments and models (default .work)",
    )
    arguments = parser.parse_args()
    arguments.workloads = arguments.workloads or (QUICK if arguments.quick else workloads)
    arguments.repeat = arguments.repeat or (3 if arguments.quick else 5)
    # Not resolved: a virtual environment's interpreter is a link, and is known by its own place.
    arguments.gpt2rs_python = arguments.gpt2rs_python.absolute()
    arguments.work = arguments.work.absolute()
    return arguments


def prepare_environments(arguments: argparse.Namespace, missing: dict[str, str]) -> dict[str, Environment]:
    environments = {}
    for name in arguments.only:
        peer = PEERS[name]
        try:
            environments[name] = prepare(peer, arguments.work, arguments.gpt2rs_python, arguments.with_torch)
        except Missing as why:
            missing[peer.title] = str(why)
    return environments


def prepare_checkpoint(work: Path) -> tuple[Path, str, check.Reference]:
    """The checkpoint's folder, what identifies it, and its greedy tokens."""
    folder = work / "checkpoint"
    made_from: dict[str, object] = {
        "shape": vars(SHAPE),
        "seed": SEED,
        "program": digest(HERE / "checkpoint.py"),
    }
    write_once(folder, made_from, lambda: write_checkpoint(folder, SHAPE))
    identity = json.dumps(made_from)
    programs = [digest(HERE / name) for name in ("reference.py", "workloads.py")]
    reference_from: dict[str, object] = {"checkpoint": identity, "programs": programs}
    return folder, identity, check.reference(folder, work / "reference", reference_from)


def entries_of(
    dtype: str,
    environments: dict[str, Environment],
    checkpoint: Path,
    identity: str,
    work: Path,
    missing: dict[str, str],
) -> list[Entry]:
    entries = []
    for name, environment in environments.items():
        peer = PEERS[name]
        if dtype not in peer.variants:
            missing[f"{peer.title} {dtype}"] = "has no such form"
        for variant in peer.variants.get(dtype, ()):
            try:
                model = converted(peer, variant, environment, checkpoint, work, identity)
            except Missing as why:
                missing[f"{peer.title} {variant}"] = str(why)
            else:
                entries.append(Entry(peer, variant, environment, model))
    return entries


def main() -> int:
    arguments = parse_arguments()
    load = os.getloadavg()[0]
    missing: dict[str, str] = {}
    environments = prepare_environments(arguments, missing)
    checkpoint, identity, reference = prepare_checkpoint(arguments.work)
    course = Course(
        workloads=[WORKLOADS[name] for name in arguments.workloads],
        repeat=arguments.repeat,
        n_threads=arguments.threads,
        n_vocab=SHAPE.n_vocab,
        gpt2rs_python=arguments.gpt2rs_python,
        logs=arguments.work / "logs",
    )
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "load": load,
        "threads": arguments.threads,
        "installed_bytes": {name: found.installed_bytes for name, found in environments.items()},
        "runs": {},
        "missing": missing,
    }
    print(", ".join([record["date"], *record["machine"].values(), f"{arguments.threads} threads"]))
    print(f"load before the run: {record['load']:.1f} (above 0.5 something else is running)")
    print(f"median (minimum, maximum) of {arguments.repeat}", flush=True)
    right, any_ran = True, False
    for dtype in arguments.dtype:
        run = SideBySide(
            entries_of(dtype, environments, checkpoint, identity, arguments.work, missing), course
        )
        run.run(reference)
        missing |= {f"{title} ({dtype})": why for title, why in run.failed.items()}
        print(f"\n== {dtype}", flush=True)
        if not run.entries:
            print("\nno peer could run")
            continue
        any_ran = True
        report.print_run(dtype, run, course.workloads, SHAPE)
        record["runs"][dtype] = {"machine": run.probes, "peers": [entry.figures() for entry in run.entries]}
        if dtype == "float32":
            right = all(entry.agreement and entry.agreement.holds_for_float32 for entry in run.entries)
    report.print_sizes(environments)
    report.print_missing(missing)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if right and any_ran else 1


if __name__ == "__main__":
    # So that a terminated run, too, ends its workers, which are stopped and would stay.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
