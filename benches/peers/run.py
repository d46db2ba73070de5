"""gpt2rs beside its peers: the same random 124M GPT-2, the same work, in turns, in one run.

README.md tells what is measured and how. Exit status 1: a float32 text is wrong, or nothing could run.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import machine
import report
from checkpoint import Shape, digest, prepared
from conversions import converted
from environments import Environment, Missing, prepare
from peers import DTYPES, GPT2RS, PEERS
from side_by_side import Course, Entry, SideBySide
from workloads import LARGEST_BATCH, QUICK, WORKLOADS, Workload, select

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


def counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count(part) for part in text.split(",")))


def batches(text: str) -> tuple[int, ...]:
    sizes = counts(text)
    if max(sizes) > LARGEST_BATCH:
        raise argparse.ArgumentTypeError(f"{max(sizes)} sequences are more than {LARGEST_BATCH}")
    return sizes


def parse_arguments() -> argparse.Namespace:
    peers, workloads = tuple(PEERS), tuple(WORKLOADS)
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    add = parser.add_argument
    add("--only", metavar="PEER,...", type=one_or_more_of(peers), default=peers, help=", ".join(peers))
    add(
        "--quick",
        action="store_true",
        help="every width and every peer, but fewer new tokens and two rounds: under five minutes",
    )
    add("--workloads", metavar="NAME,...", type=one_or_more_of(workloads), help=", ".join(workloads))
    add(
        "--batch",
        metavar="N,...",
        type=batches,
        help="only workloads of so many sequences: 1 is all but batch-*, any other makes a batch-N",
    )
    add(
        "--threads",
        metavar="N,...",
        type=counts,
        help="of every peer (default 2, with --quick 1,2); the largest does everything, others only decode-*",
    )
    add(
        "--dtype",
        metavar="DTYPE,...",
        type=one_or_more_of(DTYPES),
        help=", ".join(DTYPES) + " (default float32, with --quick all)",
    )
    add("--repeat", metavar="N", type=count, help="timed rounds (default 5, with --quick 2)")
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
    chosen = select(arguments.workloads or (QUICK if arguments.quick else workloads), arguments.batch)
    if not chosen:
        parser.error("no workload is left")
    arguments.workloads = [work.shortened() for work in chosen] if arguments.quick else chosen
    arguments.dtype = arguments.dtype or (DTYPES if arguments.quick else ("float32",))
    arguments.threads = arguments.threads or ((1, 2) if arguments.quick else (2,))
    arguments.repeat = arguments.repeat or (2 if arguments.quick else 5)
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
    folder, identity = prepared(work)
    reference_from: dict[str, object] = {
        "checkpoint": identity,
        "program": digest(HERE / "reference.py"),
        "workload": vars(check.CHECK),
    }
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
                missing[f"{peer.title} {variant}" + (" packed" if peer is GPT2RS else "")] = str(why)
                if peer is not GPT2RS:
                    continue
                # The form may be there all the same, only not as a file.
                model = checkpoint
            entries.append(Entry(peer, variant, environment, model))
    return entries


def without_folders(messages: dict[str, str]) -> dict[str, str]:
    """Paths in them are cut down to the last name: what is published tells nothing of a machine."""
    path = re.compile(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+")
    return {title: path.sub("", why) for title, why in messages.items()}


def save(record: dict[str, Any], missing: dict[str, str], file: Path | None) -> None:
    """Written after each width, so that a run that is ended leaves what it has."""
    if file:
        file.write_text(json.dumps(record | {"missing": without_folders(missing)}, indent=1) + "\n")


def of_one_sequence(workloads: list[Workload], quick: bool) -> list[Workload]:
    """What fewer threads do."""
    decodes = [workload for workload in workloads if workload.is_decode and workload.batch == 1]
    return decodes[:1] if quick else decodes


def main() -> int:
    arguments = parse_arguments()
    load = os.getloadavg()[0]
    missing: dict[str, str] = {}
    environments = prepare_environments(arguments, missing)
    checkpoint, identity, reference = prepare_checkpoint(arguments.work)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "load": load,
        "repeat": arguments.repeat,
        "workloads": {workload.name: vars(workload) for workload in arguments.workloads},
        "installed": {name: installed(found) for name, found in environments.items()},
        "runs": [],
    }
    threads = sorted(arguments.threads)
    print(", ".join([record["date"], *record["machine"].values(), f"{threads_text(threads)}"]))
    print(f"load before the run: {load:.1f} (above 0.5 something else is running)")
    print(f"median (minimum, maximum) of {arguments.repeat}", flush=True)
    right, any_ran = True, False
    for dtype in arguments.dtype:
        entries = entries_of(dtype, environments, checkpoint, identity, arguments.work, missing)
        for n_threads in threads:
            whole = n_threads == max(threads)
            workloads = (
                arguments.workloads if whole else of_one_sequence(arguments.workloads, arguments.quick)
            )
            if not workloads:
                continue
            # The longest prompt brings up memory and code that the others use as well.
            longest = max(workloads, key=lambda workload: workload.prompt)
            course = Course(
                workloads=workloads,
                warm_up=[longest] if arguments.quick else workloads,
                repeat=arguments.repeat,
                n_threads=n_threads,
                whole=whole,
                shape=SHAPE,
                gpt2rs_python=arguments.gpt2rs_python,
                logs=arguments.work / "logs",
            )
            run = SideBySide([entry.afresh() for entry in entries], course)
            run.run(reference)
            missing |= {f"{title} ({dtype})": why for title, why in run.failed.items()}
            print(f"\n== {dtype}, {threads_text([n_threads])}", flush=True)
            if not run.entries:
                print("\nno peer could run")
                continue
            any_ran = True
            report.print_run(dtype, run)
            record["runs"].append(
                {
                    "dtype": dtype,
                    "threads": n_threads,
                    "limits": run.probes,
                    "peers": [entry.figures(course.workloads) for entry in run.entries],
                }
            )
            if dtype == "float32" and whole:
                right = all(entry.agreement and entry.agreement.holds_for_float32 for entry in run.entries)
            save(record, missing, arguments.json)
    report.print_sizes(environments)
    report.print_missing(without_folders(missing))
    save(record, missing, arguments.json)
    return 0 if right and any_ran else 1


def threads_text(threads: list[int]) -> str:
    return " and ".join(map(str, threads)) + (" thread" if threads == [1] else " threads")


def installed(environment: Environment) -> dict[str, Any]:
    return {
        "version": environment.version,
        "bytes": environment.installed_bytes,
        "numpy_bytes": environment.numpy_bytes,
    }


if __name__ == "__main__":
    # So that a terminated run, too, ends its workers, which are stopped and would stay.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
