"""What the figures were taken on."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "kvpass", "triton", "numpy")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str | int]:
    return {
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def slug(facts: dict[str, str | int]) -> str:
    """A short name for file names, such as `intel-xeon-2t`."""
    words = re.sub(r"\([^)]*\)|@.*|\b(cpu|processor|core)\b", " ", str(facts["cpu"]).lower())
    return "-".join(re.findall(r"[a-z0-9]+", words)[:4]) + f"-{facts['threads']}t"
