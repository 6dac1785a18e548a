"""Faults to inject: packages and commands that are not what they should be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Install = Callable[..., None]
Command = Callable[[str, str], None]


@pytest.fixture
def packages_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return folder


@pytest.fixture
def install(packages_folder: Path) -> Install:
    """`install(name, version, requires=(), summary="", files=())` writes a package's metadata."""

    def write(name: str, version: str, requires=(), summary: str = "", files=()) -> None:
        info = packages_folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Summary: {summary}"] if summary else []
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        if files:
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file in files:  # Python 3.12 lists only those that exist
            (packages_folder / file).parent.mkdir(parents=True, exist_ok=True)
            (packages_folder / file).touch()

    return write


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command(name, script)` puts a shell script first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write
