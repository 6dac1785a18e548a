"""How environments are built: which index, which installer, and whether the constraint files are what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "environment.py"


@pytest.fixture(scope="module")
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("code", "options"), [(0, []), (1, ["--extra-index-url", "{index}"])])
def test_the_documented_index_is_added_only_where_pip_sees_no_cpu_build(
    environment: ModuleType, capsys: pytest.CaptureFixture[str], code: int, options: list[str]
) -> None:
    asked = []

    def run(command: Sequence[str]) -> int:
        asked.append(command)
        return code

    found = environment.index_options("python", run)
    assert found == [option.format(index=environment.CPU_INDEX) for option in options]
    assert asked[0][-1] == environment.cpu_torch() == "torch==2.13.0+cpu"
    assert (environment.CPU_INDEX in capsys.readouterr().out) == bool(options)


def test_the_index_is_named_in_one_place(environment: ModuleType) -> None:
    files = [environment.ROOT / "Makefile", environment.ROOT / "pyproject.toml", environment.ROOT / ".ci" / "run"]
    assert not [file for file in files if "download.pytorch.org" in file.read_text()]


def test_uv_gets_pips_sources(environment: ModuleType) -> None:
    listing = ":env:.find-links='/wheels'\nglobal.extra-index-url='file:///a b/simple'\nglobal.cert='/x'\n"
    assert environment.pip_settings(listing) == [
        "--find-links", "/wheels", "--extra-index-url", "file:///a", "--extra-index-url", "b/simple",
    ]  # fmt: skip
    command = environment.installer("py", ["--extra-index-url", "I"], "/bin/uv")
    assert command[:3] == ["/bin/uv", "pip", "install"]
    assert command[-2:] == ["--extra-index-url", "I"]
    assert environment.installer("py", [], None)[:4] == ["py", "-m", "pip", "install"]


@pytest.mark.slow
@pytest.mark.parametrize("uv", [None, "/bin/uv"])
def test_what_a_cpu_environment_is_made_of(environment: ModuleType, uv: str | None) -> None:
    def steps(**options: bool) -> list[str]:
        return [" ".join(step) for step in environment.commands("cpu", Path("v"), uv=uv, indexes=[], **options)]

    free, locked = steps(locked=False), steps(locked=True)
    assert free[0].endswith("-e .[cpu,dev]")
    assert locked[0].endswith("--require-hashes -r constraints/cpu.txt")
    assert locked[1].endswith("--no-deps -e .")
    assert free[1:] == locked[2:]
    assert "uninstall" in free[1]
    assert free[-1].endswith("megatron_r1reward.torchvision_cpu install")


def test_an_unsupported_python_is_named(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match=r"not supported: make setup PYTHON=python3\.11 \(3\.11 or 3\.12\)"):
        environment.build("cpu", Path("v"), locked=False, dry_run=True)


def test_the_constraint_files_satisfy_pyproject(environment: ModuleType) -> None:
    done = subprocess.run([sys.executable, PROGRAM, "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_constraint_file_that_does_not_is_an_error(environment: ModuleType) -> None:
    text = (environment.ROOT / "constraints" / "recipes.txt").read_text()
    assert environment.problems("recipes", text) == []
    wrong = text.replace("nemo-run==0.11.1", "nemo-run==0.10.0")
    assert "pyproject.toml wants nemo-run==0.11.1" in environment.problems("recipes", wrong)[0]
    assert "holds an address" in environment.problems("recipes", f"--index-url https://x/simple\n{text}")[0]
    assert "has no hash" in environment.problems("recipes", f"{text}\nadditional==1.0\n")[0]
