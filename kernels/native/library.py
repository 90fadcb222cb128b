"""C++ of this folder as functions: compiled on first use, kept on disk, and found there by other processes.

Owns the compiler's command and the folder; knows no kernel's arguments. Without a compiler there are no functions, and
whoever asks runs torch's operations instead.
"""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp")
"""No -ffast-math: infinities and the order of comparisons matter. OpenMP is the one that torch has loaded already: both
have one name, `libgomp.so.1`.
"""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The macro KIND, by the dtype of keys and values."""

SECONDS = 120
"""A compiler that takes longer is given up."""


@lru_cache(maxsize=256)
def function(name: str, **words: int) -> Any:
    """The function `name` of `<name>.cpp`, compiled with macros; None where that is not possible, once and for all.

    words: macros by name; they tell libraries apart.
    """
    try:
        return getattr(ctypes.CDLL(str(_library(name, tuple(sorted(words.items()))))), name)
    except (OSError, subprocess.SubprocessError) as error:
        _say(name, _told(error))
        return None


@lru_cache(maxsize=16)
def _say(name: str, why: str) -> None:
    """Once for each reason."""
    logger.warning("kvpass runs %s by torch's operations, two to four times slower: %s", name, why)


def _told(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    return f"{error}\n{said.decode(errors='replace')[-2000:]}" if said else str(error)


def _library(name: str, words: tuple[tuple[str, int], ...]) -> Path:
    """The path of a compiled library. Written beside and renamed: two processes may do the same.

    Raises:
        OSError: no compiler, or not Linux.
        subprocess.SubprocessError: it failed.
    """
    key = hashlib.sha256(f"{_sources()} {_machine()} {name} {words}".encode()).hexdigest()[:24]
    path = _cache() / f"{name}-{key}.so"
    if path.exists():
        return path
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    macros = [f"-D{word}={value}" for word, value in words]
    command = [_compiler(), *FLAGS, *macros, "-o", scratch]
    try:
        source = str(FOLDER / f"{name}.cpp")
        subprocess.run([*command, source], capture_output=True, check=True, timeout=SECONDS)
        Path(scratch).rename(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


@lru_cache(maxsize=1)
def _compiler() -> str:
    """Raises OSError if there is none that knows our flags."""
    if platform.system() != "Linux":
        raise OSError(f"kernels of our own are compiled on Linux only, this is {platform.system()}")
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise OSError("no C++ compiler is found: install g++, or say CXX=/path/to/it")


@lru_cache(maxsize=1)
def _sources() -> str:
    """A digest of all C++ here, and of how it is compiled."""
    texts = [path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
    return hashlib.sha256(b"".join([*texts, " ".join(FLAGS).encode()])).hexdigest()


@lru_cache(maxsize=1)
def _machine() -> str:
    """What code that was compiled for this machine may use: a folder may be shared by several."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout.decode()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return f"{compiler} {version.splitlines()[0]} {platform.machine()} {sorted(about)}"


@lru_cache(maxsize=1)
def _cache() -> Path:
    """A folder that is this user's alone: beside Inductor's compiled code, or else a new one.

    Raises:
        OSError: none can be made.
    """
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder = Path(beside or Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}") / "kvpass"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="kvpass-"))
