"""What torchrun runs: `models.ranks.main` in a process that finds the tests' helpers as pytest does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main(folder: str, *cases: str) -> None:
    path = Path(__file__).resolve().parent.parent / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    from models import ranks

    ranks.main(folder, *cases)


if __name__ == "__main__":
    main(*sys.argv[1:])
