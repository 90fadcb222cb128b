"""The wheel: what is in it, and that it works far from the repository."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of wheel and sdist, built from a copy of the sources as README says: no leftovers get in, none are
    made.
    """
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = (sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(folder))
    run(*build, "--wheel", "--sdist", str(source), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-P", "-m", "pip", "install", "-q", "--no-deps", "--no-compile")
    run(*pip, "--target", str(target), str(wheel))
    return target


def lent() -> list[str]:
    """Where the dependencies of this environment are; its .pth files are not read there."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    return [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.origin).parent.parent)]


def outside(site: Path, *command: str) -> str:
    """Runs Python on the installed wheel: `-S` so that no editable install's .pth file is read."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *lent()])}
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
            if file.suffix in {".py", ".yaml", ".json", ".html", ".typed", ".cpp", ".h"}:
                wanted.add(f"{package.replace('.', '/')}/{file.relative_to(ROOT / room).as_posix()}")
    assert names == wanted


def test_the_wheel_has_the_presets_and_the_licence(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    presets = {Path(name).stem for name in names if name.startswith("kvpass/policy/presets/")}
    assert {"full", "streaming_llm", "h2o", "tova", "snapkv", "roco"} <= presets
    assert any(name.endswith("/LICENSE") for name in names)


def test_wheel_and_sdist_say_that_they_are_typed(built: Path, wheel: Path):
    assert "kvpass/py.typed" in zipfile.ZipFile(wheel).namelist()
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as names:
        inside = {name.split("/", 1)[-1] for name in names.getnames()}
    assert "kvpass/py.typed" in inside
    assert {"kernels/rule.py", "patterns/sdpa.py", "kvpass/policy/presets/h2o.yaml", "README.md", "LICENSE"} <= inside


def test_the_metadata_is_what_pyproject_and_readme_say(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    said = email.message_from_string(archive.read(name).decode())
    project = PROJECT["project"]
    assert (said["Name"], said["Version"], said["License-Expression"]) == ("kvpass", project["version"], "Apache-2.0")
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert set(said.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert said.get_all("Classifier", []) == project["classifiers"]
    needed = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=!~ ;]", line)[0] for line in needed} == {"torch", "networkx", "pydantic", "PyYAML"}


def test_a_clean_environment_has_the_command(wheel: Path, tmp_path: Path):
    """`pip install` into a new virtual environment, whose dependencies are lent by this one."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "new"))
    python = tmp_path / "new" / "bin" / "python"
    pip = (sys.executable, "-P", "-m", "pip", f"--python={python}", "install", "-q", "--no-deps", "--no-compile")
    run(*pip, str(wheel))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(lent())}
    where = run(str(python), "-P", "-c", "import kvpass; print(kvpass.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(tmp_path / "new")
    assert "snapkv" in run(str(tmp_path / "new" / "bin" / "kvpass"), "policies", cwd=tmp_path, env=environment)


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
