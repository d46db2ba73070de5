"""The tables: medians with minimum and maximum, and gpt2rs's ratio to each peer."""

from statistics import median

from check import FLOAT32_MARGIN
from checkpoint import Shape
from environments import Environment
from peers import GPT2RS, PEERS
from side_by_side import Entry, Probe, SideBySide
from workloads import FIRST_TOKEN, Workload

MEGABYTE = 1e6
Row = tuple[str, ...]


def spread(values: list[float], digits: int = 1) -> str:
    """`median (minimum, maximum)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"


def ratios(ours: list[float], theirs: list[float]) -> str:
    """Ours over theirs within each repeat, where the two ran soon after one another."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], 2)


def print_table(heading: Row, rows: list[Row]) -> None:
    widths = [max(len(row[i]) for row in [heading, *rows]) for i in range(len(heading))]
    print()
    for row in [heading, *rows]:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def print_run(dtype: str, run: SideBySide) -> None:
    """Everything about one width at one number of threads."""
    print_machine([probe for probes in run.probes.values() for probe in probes])
    if run.course.whole:
        print_agreement(dtype, run.entries)
    for workload in run.course.workloads:
        print_workload(run, workload)
    if run.course.whole:
        print_starts(run)


def ours_of(run: SideBySide) -> list[Entry]:
    """gpt2rs's own rows: every other row is held against each."""
    return [entry for entry in run.entries if entry.peer is GPT2RS]


def print_starts(run: SideBySide) -> None:
    ours = ours_of(run)
    print_table(
        (
            FIRST_TOKEN.title,
            "s",
            *(f"row/{entry.peer.title} {entry.variant}" for entry in ours),
            "peak memory, MB",
            "weights, MB",
        ),
        [
            (
                entry.title,
                spread(entry.first_token_s, 2),
                *("" if own is entry else ratios(entry.first_token_s, own.first_token_s) for own in ours),
                f"{median(entry.peak_memory_bytes) / MEGABYTE:.0f}",
                f"{entry.weight_bytes / MEGABYTE:.0f}",
            )
            for entry in run.entries
        ],
    )


def print_machine(probes: list[Probe]) -> None:
    figures: dict[str, list[float]] = {}
    for probe in probes:
        if isinstance(probe, dict):
            for limit, rate in probe.items():
                figures.setdefault(limit, []).append(rate)
    if not figures:
        print(f"\nmachine: {probes[0] if probes else 'not measured'}")
        return
    limits = [
        f"read bandwidth {spread(rates)} GB/s" if limit == "read" else f"{limit} {spread(rates, 0)} GFLOP/s"
        for limit, rates in figures.items()
    ]
    print("\nmachine: " + ", ".join(limits))


def print_agreement(dtype: str, entries: list[Entry]) -> None:
    rows = []
    for entry in entries:
        assert entry.agreement is not None
        verdict = ""
        if dtype == "float32":
            verdict = "same" if entry.agreement.holds_for_float32 else "DIFFERS"
        before = f"{entry.agreement.agreeing} of {entry.agreement.total}"
        margin = f"{entry.agreement.widest:.4f}" if entry.agreement.widest else "-"
        alone = "yes" if entry.agreement.same_in_batch else "NO"
        rows.append((entry.title, before, margin, alone, verdict))
    verdict = f"margins above {FLOAT32_MARGIN}" if dtype == "float32" else ""
    print_table(
        ("greedy tokens", "before a difference", "margin overruled", "alone as in batch", verdict), rows
    )


def print_workload(run: SideBySide, workload: Workload) -> None:
    ours = ours_of(run)
    rows = []
    for entry in run.entries:
        speeds = entry.tokens_per_second[workload.name]
        cells = [entry.title, spread(speeds)]
        for own in ours:
            cells.append("" if own is entry else ratios(own.tokens_per_second[workload.name], speeds))
        if workload.is_decode:
            cells.append(f"{entry.bytes_per_token(workload) / MEGABYTE:.1f}")
        cells.append(share(entry, workload, run.probes[workload.name], run.course.shape))
        rows.append(tuple(cells))
    limit = ("MB/token", "of read bandwidth") if workload.is_decode else ("of the peak",)
    new = f", {workload.new} new tokens" if workload.is_decode else ""
    against = tuple(f"{entry.peer.title} {entry.variant}/row" for entry in ours)
    print_table((workload.title + new, "tokens/s", *against, *limit), rows)


def share(entry: Entry, workload: Workload, probes: list[Probe], shape: Shape) -> str:
    """Percent of the machine's limit in the same repeat; for a prefill, of the peak of what is multiplied."""
    if any(isinstance(probe, str) for probe in probes):
        return "-"
    limits = [probe for probe in probes if isinstance(probe, dict)]
    # An older core can't measure all peaks.
    limit = "read" if workload.is_decode else entry.multiplies if entry.multiplies in limits[0] else "float32"
    work = entry.bytes_per_token(workload) if workload.is_decode else workload.flops_per_token(shape)
    reached = [
        100 * work * speed / 1e9 / probe[limit]
        for probe, speed in zip(limits, entry.tokens_per_second[workload.name], strict=True)
    ]
    return f"{median(reached):.0f} %" + ("" if workload.is_decode else f" {limit}")


def print_sizes(environments: dict[str, Environment]) -> None:
    print_table(
        ("installed, with all it requires", "MB", "NumPy's part"),
        [
            (
                f"{PEERS[name].title} {found.version}",
                f"{found.installed_bytes / MEGABYTE:.0f}",
                f"{found.numpy_bytes / MEGABYTE:.0f}",
            )
            for name, found in environments.items()
        ],
    )


def print_missing(missing: dict[str, str]) -> None:
    print()
    for title, why in missing.items():
        print(f"missing: {title}: {why}")
