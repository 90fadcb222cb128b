"""An OpenAI-compatible server on one compiled model: continuous batching under a budget of bytes (docs/serving.md).

    python -P examples/serve.py [--tiny] [--policy snapkv] [--budget 0.25] [--kv-bytes 1GiB] [--system "You are .."]

Needs `pip install ".[hf,serve]"`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from serving.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
