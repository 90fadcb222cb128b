"""Files of a rank's heads: each rank has its own, and goes on with it in a run of as many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvpass.errors import StaleCacheError
from kvpass.runtime.sharded import Sharded, in_group


def of_this_rank(path: Path, said: dict[str, Any], part: Sharded | None) -> dict[str, Any]:
    """What a file says, with rules that name the process group of this run.

    Raises:
        StaleCacheError: it holds the heads of another rank, of another number of ranks, or all heads.
    """
    made, here = said.get("part", ""), str(part) if part is not None else ""
    if made != here:
        raise StaleCacheError(
            f"the cache holds {f'the heads of {made}' if made else 'all heads'}, and this process has "
            f"{f'those of {here}' if here else 'all of them'}",
            where=str(path),
            hint="each rank saves and loads a file of its own, in runs of as many ranks; or run the prompt again",
        )
    if part is None:
        return said
    return {**said, "stores": [{**one, "rule": in_group(one["rule"], part.group)} for one in said["stores"]]}
