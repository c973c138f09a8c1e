"""Environments that hold other packages than the one the tests run in, but share its torch.

A virtual environment is made without anything; a path file shows it torch, as links into the
environment that runs the tests. So pip finds torch there and installs only what was asked for and
what that needs: seconds, where torch alone takes half a minute and, from its default index, is a
CUDA build of gigabytes. The links lie outside of the environment: what pip finds outside, it
neither changes nor removes; what it installs stands in front.

What is made is kept in the user's cache directory. Its name is a digest of all that decides its
content, so another Python, torch or requirement makes another; those whose base is gone are
removed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import pytest

BASE_NAME = "base"  # in an environment: a link to the one that it shares torch with
COMPLETE_NAME = "complete.json"  # written last: what is installed
LINES_OF_A_FAILURE = 15
PIP_TIMEOUT_S = 420


class RegistryError(RuntimeError):
    """pip could not get what it was asked for."""


def cache_directory() -> Path:
    """Where environments are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tablefree" / "environments"


def pip(*arguments: str, python: Path | None = None) -> str:
    """What the pip of this environment prints, working on another one if told its interpreter.
    Raises RegistryError.
    """
    target = ["--python", str(python)] if python else []
    command = [
        sys.executable,
        "-m",
        "pip",
        *target,
        "--disable-pip-version-check",
        "--quiet",
        *arguments,
    ]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RegistryError(f"pip {' '.join(arguments)}: no end after {PIP_TIMEOUT_S} s") from None
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
        last = "\n".join(lines[-LINES_OF_A_FAILURE:])
        raise RegistryError(f"pip {' '.join(arguments)}:\n{last}")
    return result.stdout


def newest_version(requirement: str) -> str:
    """The version that pip would install for a requirement today. Raises RegistryError."""
    report = pip(
        "install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", requirement
    )
    (install,) = json.loads(report)["install"]
    return str(install["metadata"]["version"])


def with_companions(names: Iterable[str]) -> dict[str, Distribution]:
    """Installed distributions by name, each with those that it pins exactly and that are here: what
    makes a torch a CUDA build comes as such packages, of gigabytes; what has a range is left to
    pip.
    """
    found: dict[str, Distribution] = {}
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        found[name] = distribution(name)
        pinned = [
            re.match(r"([\w.-]+)[^;]*==", requirement) for requirement in found[name].requires or ()
        ]
        wanted += [match[1] for match in pinned if match and is_installed(match[1])]
    return found


def is_installed(name: str) -> bool:
    """Whether there is a distribution of that name here."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def link_packages(names: Iterable[str], directory: Path) -> None:
    """Fill a directory with links to the modules and metadata of installed distributions."""
    directory.mkdir(parents=True)
    for package in with_companions(names).values():
        tops = {Path(file.parts[0]) for file in package.files or ()}
        for top in sorted(tops - {Path("__pycache__"), Path("..")}):
            if not (directory / top).is_symlink():  # several of nvidia's share a folder
                (directory / top).symlink_to(str(package.locate_file(top)))


@contextlib.contextmanager
def skip_without_registry() -> Iterator[None]:
    """Skip a test whose packages can't be had; in continuous integration that is a failure."""
    try:
        yield
    except RegistryError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def remove_those_without_base(cache: Path) -> None:
    """Remove environments whose base is gone: their torch is too."""
    for old in cache.iterdir():
        if (old / BASE_NAME).is_symlink() and not (old / BASE_NAME).exists():
            shutil.rmtree(old, ignore_errors=True)  # several may be at it at once


def python_of(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / "venv" / "bin" / "python"


def prepare_environment(
    requirements: Sequence[str],
    shared: Sequence[str] = ("torch", "numpy"),
    without: Sequence[str] = (),
) -> Path:
    """The interpreter of an environment with these requirements, and `shared` as it is here.

    The environment is made if need be; `without` are packages that they bring and that don't fit
    the shared torch. Raises RegistryError.
    """
    content: dict[str, Any] = {
        "requirements": [*requirements],
        "shared": {name: version(name) for name in shared},
        "python": sys.version,
        "base": sys.prefix,
    }
    if without:
        content["without"] = [*without]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    remove_those_without_base(cache)
    environment = cache / key
    if not (environment / COMPLETE_NAME).exists():
        shutil.rmtree(environment, ignore_errors=True)
        make_environment(environment, requirements, shared)
        if without:
            pip("uninstall", "--yes", *without, python=python_of(environment))
        (environment / COMPLETE_NAME).write_text(json.dumps(content, indent=1) + "\n")
    return python_of(environment)


def make_environment(environment: Path, requirements: Sequence[str], shared: Sequence[str]) -> None:
    """Make an environment from nothing. Raises RegistryError."""
    link_packages(shared, environment / "shared")
    (environment / BASE_NAME).symlink_to(sys.prefix)
    venv.create(environment / "venv", symlinks=True)
    (site_packages,) = (environment / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "shared.pth").write_text(f"{environment / 'shared'}\n")
    pins = environment / "constraints.txt"
    pins.write_text("".join(f"{name}=={version(name)}\n" for name in shared))
    pip(
        "install",
        "--no-compile",
        "--constraint",
        str(pins),
        *requirements,
        python=python_of(environment),
    )
