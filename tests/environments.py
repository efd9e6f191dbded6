"""The distributions of this package, and environments to install them in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from sandbox import HERE

PROJECT = HERE.parent


def run(*command: str | Path, **variables: str) -> str:
    """Run a command that succeeds, and return what it prints."""
    done = subprocess.run(
        [str(word) for word in command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**_environment(), **variables},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _environment() -> dict[str, str]:
    """The environment variables, but those that have pip or Python work in another way."""
    strange = re.compile(r"PYTHON|PIP_(USER|TARGET|PREFIX|ROOT|REQUIRE|NO_DEPS|CONSTRAINT|PYTHON)")
    kept = {name: value for name, value in os.environ.items() if not strange.match(name)}
    return {"PIP_CACHE_DIR": str(PROJECT / ".cache/pip"), **kept}


def copy_sources(directory: Path) -> None:
    """Make a checkout of its own, since a build leaves files beside the sources.

    :param directory: one that does not exist yet
    """
    names = ("avocado_vt_joblock", "benchmarks", "docs", "etc", "packaging", "tests")
    ignore = shutil.ignore_patterns("__pycache__", "_build")
    for name in names:
        shutil.copytree(PROJECT / name, directory / name, ignore=ignore)
    for path in PROJECT.iterdir():
        if path.is_file():
            shutil.copy(path, directory)


def build(directory: Path) -> tuple[list[Path], str]:
    """Build the source distribution and the wheel.

    :param directory: an empty one
    :return: the two, and what the build printed
    """
    source, dist = directory / "source", directory / "dist"
    copy_sources(source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source]
    # Where that variable is set setuptools warns of it.
    text = run(*command, PYTHONDONTWRITEBYTECODE="")
    return sorted(dist.iterdir()), text


def install(python: Path, *arguments: str | Path, **variables: str) -> None:
    """Install something in an environment; it needs no pip of its own."""
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "install")
    run(*pip, *arguments, **variables)


def copy_packages(directory: Path, *names: str) -> None:
    """Copy what is installed here, but for scripts: that is quicker than pip, and the same."""
    for name in names:
        for file in metadata.files(name) or ():
            if ".." not in file.parts:
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), directory / file)


def new_environment(directory: Path, packages: Path | None = None, **options: bool) -> Path:
    """Make a virtual environment, and return its interpreter.

    :param packages: a directory with what is installed in it without being copied
    """
    venv.create(directory, symlinks=True, **options)
    directory.chmod(0o755)
    if packages:
        (site,) = directory.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(f"{packages}\n")
    return directory / "bin/python"
