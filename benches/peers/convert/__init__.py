"""Checkpoint to a peer's own format, one module a peer, run in that peer's environment.

Each also leaves `sizes.json`, which says what one decode step reads: `weight_bytes`, every tensor as the
format stores it, with its scales, but no table of which a step only gathers a row (wpe, and wte where the
head is stored apart); and `cache_values`, the keys and values of one position.
"""

import json
from pathlib import Path

from checkpoint import Shape


def write_sizes(folder: Path, shape: Shape, weight_bytes: int) -> None:
    sizes = {"weight_bytes": weight_bytes, "cache_values": shape.cache_values}
    (folder / "sizes.json").write_text(json.dumps(sizes) + "\n")
