"""The winner as a policy file."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from kvpass.policy.policy import Policy
from kvpass.tune.candidates import Candidate


def write(one: Candidate, path: Path, said: list[str]) -> None:
    """A YAML file that `kvpass.compile(policy=...)` takes, with comments about where it comes from.

    Args:
        said: paragraphs.
    """
    import yaml

    data: dict[str, Any] = {"name": path.stem, **one.data}
    if not one.policy.keeps_all:
        data["budget"] = one.policy.asked
    comments = [f"# {line}" for paragraph in said for line in textwrap.wrap(paragraph, 110)]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
    path.write_text("\n".join([*comments, text]))
    Policy.load(path)
