"""The machine's read bandwidth: a decode step must read every weight and every live slot once."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.timing import timed

GIB = 2**30


def last_level_cache() -> int:
    """Bytes of the largest CPU cache that Linux tells of; 0 if it tells nothing."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes)


def read_bandwidth(device: str = "cpu", repeats: int = 5) -> float:
    """Bytes per second: the best of several reads of twice the last-level cache (1 to 3 GiB)."""
    buffer = torch.ones(min(max(GIB, 2 * last_level_cache()), 3 * GIB) // 4, device=device)
    reads = (lambda: buffer.sum(), lambda: torch.dot(buffer, buffer))
    return buffer.nbytes / min(timed(read, device) for read in reads for _ in range(repeats))
