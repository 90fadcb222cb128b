"""One job of a benchmark, in a process of its own: `python -P examples/bench/worker.py JOB OUT`.

Says what it is doing, a line each, and writes its result to OUT; what it has so far to OUT.partial.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def written(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(data) + "\n")
    beside.replace(path)


def main(job: dict[str, Any], out: Path) -> None:
    import torch
    from transformers.utils import logging

    from bench.suite import module_of

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    partial, start = out.with_name(f"{out.name}.partial"), time.perf_counter()
    before = json.loads(partial.read_text()) if partial.exists() else {}
    with torch.no_grad():
        result = module_of(job["benchmark"]).work({**job, "before": before}, lambda data: written(partial, data))
    result["took_s"] = time.perf_counter() - start + before.get("took_s", 0.0)
    written(out, result)
    partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
