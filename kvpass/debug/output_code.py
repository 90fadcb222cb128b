"""Where the inner compiler's output code lies: listens to Inductor's code cache while a graph is compiled."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any


class OutputCode(AbstractContextManager["OutputCode"]):
    """Notes the generated Python files that Inductor loads inside the block, cache hits included.

    Attributes:
        paths: files of generated code, in the order of loading; empty for inner compilers that generate none.
        trouble: why listening was not possible, '' if it was.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.trouble = ""
        self._cache: Any = None
        self._original: Any = None

    def __enter__(self) -> OutputCode:
        try:
            from torch._inductor.codecache import PyCodeCache

            self._original = PyCodeCache.__dict__["load_by_key_path"]
            listening: Any = classmethod(self._listening())
        except (ImportError, KeyError, AttributeError) as error:
            self.trouble = f"this torch has no code cache that kvpass knows ({error!r})"
            return self
        self._cache = PyCodeCache
        PyCodeCache.load_by_key_path = listening  # type: ignore[method-assign]  # until __exit__
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._cache is not None:
            self._cache.load_by_key_path = self._original
            self._cache = None

    def _listening(self) -> Any:
        load, found = self._original.__func__, self.paths

        def load_by_key_path(cls: Any, key: str, path: str, *args: Any, **kwargs: Any) -> Any:
            module = load(cls, key, path, *args, **kwargs)
            if str(path) not in found and hasattr(module, "call"):
                found.append(str(path))
            return module

        return load_by_key_path

    def describe(self, error: BaseException | None) -> str:
        """Text of the stage: the files, or why there are none."""
        lines = [f"output code: {path}" for path in self.paths]
        if lines:
            lines.append(
                "07_inner_*.py beside this file are copies. TORCH_LOGS=output_code prints the code while compiling."
            )
        elif error is not None:
            lines.append("output code: none, compilation stopped.")
        elif self.trouble:
            lines.append(f"output code: not found, {self.trouble}; TORCH_LOGS=output_code prints it.")
        else:
            lines.append(
                "output code: none. inner='eager' and 'aot_eager' generate none: they run 04_rewritten.py node by node."
            )
        if error is not None:
            lines.append(f"{type(error).__name__}: {error}")
        return "\n".join([*lines, f"torch {_torch_version()}"]) + "\n"


def _torch_version() -> str:
    return str(sys.modules["torch"].__version__)
