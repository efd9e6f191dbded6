"""The distributions of this package, and environments to install them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from sandbox import HERE

PROJECT = HERE.parent


def run(*command: str | Path, **variables: str | Path) -> str:
    """Run a command without downloads and the caller's variables.

    :return: what it prints
    """
    path = os.environ["PATH"]
    kept = {"PATH": path, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, check=False, env={**kept, **variables}, **streams)
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_sources(directory: Path) -> None:
    """Make a checkout of its own, since a build leaves files beside the sources."""
    left = (".*", "__pycache__", "_build", "build", "dist", "rpmbuild")
    shutil.copytree(PROJECT, directory, ignore=shutil.ignore_patterns(*left))


def install(python: Path, *arguments: str | Path, **variables: str | Path) -> None:
    """Install something in an environment, without what it needs.

    The environment needs no pip of its own.
    """
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet")
    run(*pip, "install", "--no-deps", *arguments, **variables)


def new_environment(directory: Path, packages: Path, system: bool = False) -> Path:
    """Make an environment that shares a directory of packages, and return its
    interpreter."""
    venv.create(directory, symlinks=True, system_site_packages=system)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(f"{packages}\n")
    return directory / "bin/python"
