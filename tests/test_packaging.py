"""The wheel: what is in it, and that it works far from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DECODER = Path(__file__).parent / "cold" / "decoder.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = {"kvpass": "kvpass", "kernels": "kvpass.kernels", "patterns": "kvpass.patterns"}

BACKENDS = """
import importlib.metadata, torch
assert "kvpass" in torch._dynamo.list_backends()
import kvpass, kvpass.kernels, kvpass.patterns
print(kvpass.__file__)
print(torch._dynamo.lookup_backend("kvpass").__code__.co_filename)
print(kvpass.Policy.load("h2o").name)
"""


def run(*command: str, **kwargs: object) -> str:
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)  # type: ignore[call-overload]
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return str(outcome.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: no leftovers get in, none are made."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", str(folder), str(source), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-P", "-m", "pip", "install", "-q", "--no-deps", "--no-compile")
    run(*pip, "--target", str(target), str(wheel))
    return target


def outside(site: Path, *command: str) -> str:
    """Runs Python on the installed wheel: `-S` so that no editable install's .pth file is read."""
    paths = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return run(sys.executable, "-S", "-P", *command, cwd=site, env=environment)


def package_folders() -> set[str]:
    """Dotted names of the folders that hold Python files, as they install."""
    found = set()
    for room, package in ROOMS.items():
        for file in (ROOT / room).rglob("*.py"):
            found.add(".".join([package, *file.parent.relative_to(ROOT / room).parts]))
    return found


def test_packages_in_pyproject_are_the_folders():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == package_folders()


def test_every_package_is_a_real_one():
    # A namespace package among them would be missed by the editable install's finder.
    rooms = {package: room for room, package in ROOMS.items()}
    for package in package_folders():
        room = next(p for p in sorted(rooms, key=len, reverse=True) if (package + ".").startswith(p + "."))
        folder = ROOT / rooms[room] / package[len(room) :].lstrip(".").replace(".", "/")
        assert (folder / "__init__.py").exists(), package


def test_the_wheel_puts_only_kvpass_into_site_packages(site: Path):
    known = {"kvpass", f"kvpass-{PROJECT['project']['version']}.dist-info"}
    assert {entry.name for entry in site.iterdir()} - {"bin"} == known  # bin: the command, with pip's --target


def test_the_wheel_has_every_file_of_the_rooms_and_no_other(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = set()
    for room, package in ROOMS.items():
        for file in (ROOT / room).rglob("*"):
            if file.suffix in {".py", ".yaml", ".typed"}:
                wanted.add(f"{package.replace('.', '/')}/{file.relative_to(ROOT / room).as_posix()}")
    assert names == wanted


def test_the_wheel_has_the_presets_and_the_licence(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    presets = {Path(name).stem for name in names if name.startswith("kvpass/policy/presets/")}
    assert {"full", "streaming_llm", "h2o", "tova", "snapkv", "roco"} <= presets
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_imports_and_registers_its_backend(site: Path):
    kvpass_file, backend_file, policy = outside(site, "-c", BACKENDS).split()
    assert Path(kvpass_file) == site / "kvpass" / "__init__.py"
    assert Path(backend_file).is_relative_to(site)
    assert policy == "h2o"


@pytest.mark.parametrize("spelling", [(), ("--entry-point",)], ids=["kvpass.compile", "torch.compile"])
def test_the_wheel_compiles_and_evicts(site: Path, spelling: tuple[str, ...]):
    kvpass_file, verdict = outside(site, str(DECODER), *spelling).split()
    assert Path(kvpass_file).is_relative_to(site)
    assert verdict == "ok"
