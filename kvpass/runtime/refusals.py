"""Why what a host gave as a cache is none that can go on."""

from __future__ import annotations

from kvpass.errors import ForeignCacheError, ShellDataError, StaleCacheError


def taken_back(where: str) -> StaleCacheError:
    return StaleCacheError(
        "the cache ends with tokens that were taken back: a shorter one has been continued",
        where=where,
        hint="continue from the newest cache, or branch with copy.deepcopy(cache) before generating",
    )


def swapped(where: str) -> StaleCacheError:
    return StaleCacheError(
        "the cached keys were given as values, or the values as keys",
        where=where,
        hint="give them back in the order in which the model returned them",
    )


def read_as_data(where: str) -> ShellDataError:
    return ShellDataError(
        "the cached keys are NaN: data was read out of a compressed cache (reordered, indexed, joined or moved)",
        where=where,
        hint="pass the cache object as it was returned; copy it with copy.deepcopy, pick rows with "
        "kvpass.Cache(cache).select(rows)",
    )


def not_ours(where: str) -> ForeignCacheError:
    return ForeignCacheError(
        "the cache holds keys and values that kvpass did not make",
        where=where,
        hint="start from an empty cache: run the prompt through the compiled model too",
    )
