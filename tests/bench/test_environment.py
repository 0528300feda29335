"""Kernels are the device's, and the commit is this package's, never that of a repository around it."""

import subprocess
from pathlib import Path

import pytest

from kangaroo.bench import environment
from kangaroo.bench.environment import _commit
from kangaroo.bench.record import stamp


def test_kernels_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "describe_backend", lambda device: f"those of {device}")
    assert environment.environment()["kernel_backend"] == "those of cpu"
    assert stamp("cuda")["kernel_backend"] == "those of cuda"


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make_package(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("a project\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "Begin")
    return tmp_path


def test_own_checkout_is_reported_with_its_changes(checkout: Path) -> None:
    package = make_package(checkout / "kangaroo")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "Add the package")
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert _commit(package) == head
    (package / "__init__.py").write_text("changed = True\n")
    assert _commit(package) == f"{head}+changes"


def test_repository_around_an_installed_package_is_not_reported(checkout: Path) -> None:
    package = make_package(checkout / ".venv" / "lib" / "site-packages" / "kangaroo")
    assert _commit(package) is None
    git(checkout, "add", "--force", ".")
    git(checkout, "commit", "--quiet", "-m", "Vendor it")
    assert _commit(package) is None


def test_no_repository_has_no_commit(tmp_path: Path) -> None:
    assert _commit(make_package(tmp_path / "kangaroo")) is None
