"""The tables: medians with minimum and maximum, and gpt2rs's ratio to each peer."""

from statistics import median

from check import FLOAT32_MARGIN
from checkpoint import Shape
from environments import Environment
from peers import GPT2RS, PEERS
from side_by_side import Entry, Probe, SideBySide
from workloads import BYTES_PER_VALUE, FIRST_TOKEN, Workload

MEGABYTE = 1e6
Row = tuple[str, ...]


def spread(values: list[float], digits: int = 1) -> str:
    """`median (minimum, maximum)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"


def ratios(ours: list[float] | None, theirs: list[float]) -> str:
    """Ours over theirs within each repeat, where the two ran soon after one another."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], 2) if ours else "-"


def print_table(heading: Row, rows: list[Row]) -> None:
    widths = [max(len(row[i]) for row in [heading, *rows]) for i in range(len(heading))]
    print()
    for row in [heading, *rows]:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def print_run(dtype: str, run: SideBySide, workloads: list[Workload], shape: Shape) -> None:
    """Everything about one width."""
    print_machine([probe for probes in run.probes.values() for probe in probes])
    print_agreement(dtype, run.entries)
    for workload in workloads:
        print_workload(dtype, run, workload, shape)
    ours = next((entry for entry in run.entries if entry.peer is GPT2RS), None)
    print_table(
        (FIRST_TOKEN.title, "s", "peer/gpt2rs", "peak memory, MB"),
        [
            (
                entry.title,
                spread(entry.first_token_s, 2),
                ratios(entry.first_token_s, ours.first_token_s) if ours and ours is not entry else "",
                f"{median(entry.peak_memory_bytes) / MEGABYTE:.0f}",
            )
            for entry in run.entries
        ],
    )


def print_machine(probes: list[Probe]) -> None:
    figures = [probe for probe in probes if isinstance(probe, dict)]
    if not figures:
        print(f"\nmachine: {probes[0] if probes else 'not measured'}")
        return
    bandwidth = spread([figure["read_gb_per_s"] for figure in figures])
    fma = spread([figure["fma_gflop_per_s"] for figure in figures], 0)
    print(f"\nmachine: read bandwidth {bandwidth} GB/s, float32 FMA {fma} GFLOP/s")


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


def print_workload(dtype: str, run: SideBySide, workload: Workload, shape: Shape) -> None:
    ours = next((e.tokens_per_second[workload.name] for e in run.entries if e.peer is GPT2RS), None)
    rows = []
    for entry in run.entries:
        speeds = entry.tokens_per_second[workload.name]
        ratio = "" if entry.peer is GPT2RS else ratios(ours, speeds)
        percent = share(dtype, run.probes[workload.name], workload, shape, speeds)
        rows.append((entry.title, spread(speeds), ratio, percent))
    limit = "of read bandwidth" if workload.is_decode else "of FMA peak"
    print_table((workload.title, "tokens/s", "gpt2rs/peer", limit), rows)


def share(dtype: str, probes: list[Probe], workload: Workload, shape: Shape, speeds: list[float]) -> str:
    """Percent of the machine's limit in the same repeat, taking a peer's bytes to be those of the width."""
    reached = []
    for probe, speed in zip(probes, speeds, strict=True):
        if isinstance(probe, str) or (workload.is_decode and dtype not in BYTES_PER_VALUE):
            return "-"
        if workload.is_decode:
            gb_per_s = workload.bytes_per_second(speed, shape, BYTES_PER_VALUE[dtype]) / 1e9
            reached.append(100 * gb_per_s / probe["read_gb_per_s"])
        else:
            gflop_per_s = workload.flops_per_second(speed, shape) / 1e9
            reached.append(100 * gflop_per_s / probe["fma_gflop_per_s"])
    return f"{median(reached):.0f} %"


def print_sizes(environments: dict[str, Environment]) -> None:
    print_table(
        ("installed, with all it requires", "MB"),
        [
            (f"{PEERS[name].title} {found.version}", f"{found.installed_bytes / MEGABYTE:.0f}")
            for name, found in environments.items()
        ],
    )


def print_missing(missing: dict[str, str]) -> None:
    print()
    for title, why in missing.items():
        print(f"missing: {title}: {why}")
