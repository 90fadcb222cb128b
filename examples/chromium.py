"""A real browser without a window: Debian's `chromium`, or whichever of its kind is on the path."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MISSING = f"no browser found, of {', '.join(NAMES)}; on Debian and Ubuntu: apt install chromium"
SECONDS = 120


def find() -> str:
    """Its path."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(MISSING)
    return found


def run(*flags: str, page: Path, fragment: str = "") -> str:
    """What it prints about a local page. It gets no network: every host name is unknown to it."""
    url = page.resolve().as_uri() + fragment
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with tempfile.TemporaryDirectory() as profile:
        command = [find(), *quiet, f"--user-data-dir={profile}", "--virtual-time-budget=20000", *flags, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def dom(page: Path, fragment: str = "") -> str:
    """The page's HTML after its scripts have run."""
    return run("--dump-dom", page=page, fragment=fragment)


def screenshot(page: Path, to: Path, width: int, height: int) -> None:
    """A PNG of the page's upper left corner."""
    run(f"--screenshot={to.resolve()}", f"--window-size={width},{height}", "--hide-scrollbars", page=page)
    if not to.is_file():
        raise RuntimeError(f"{page}: no screenshot was made")
