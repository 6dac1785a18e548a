"""The rules of the house: small rooms, few of them. CONTRIBUTING.md has them in words; lint-imports has the layers."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_r1reward"
MODULE_LINES, FUNCTION_LINES, CRUMB_LINES = 400, 60, 40

# Functions that are longer, each with the reason. Device code is one function by its nature.
LONG_FUNCTIONS = {
    "kernels.policy_loss.triton_row.row_kernel": "a kernel: device code cannot be cut where the reader would like",
    "kernels.policy_loss.triton_loss.row_loss": "a kernel: device code",
    "kernels.policy_loss.triton_loss.loss_kernel": "a kernel: device code",
    "rollout.open_pool.open_rollout_pool": "the one place that puts a pool together",
    "models.qwen2_5_vl.config.build_configs": "one table of megatron-core's settings",
}
# Modules of under 40 lines of code with one user or none, each with the reason why it is a module of its own.
CRUMBS = {
    "servers.vllm_executor": "named to vLLM as a string; imported by its processes only",
    "weight_sync.vllm_plugin": "an entry point that vLLM loads in every process: nothing else may come with it",
    "servers.vllm_scalar": "models named to vLLM's registry as strings; imported by its processes only",
    "network.breaker": "an idea of its own: the judge's client is its user today",
    "network.guard": "users name it to vLLM servers of their own (docs/run-files.md)",
    # Programs: what a process imports before anything else.
    "launch.step_main": "what every rank of a job step imports first: as little as possible",
    "servers.vllm_main": "the program of a server's process, started with -m",
}


@cache
def modules() -> dict[str, ast.Module]:
    """Modules without `__init__`, by dotted name below the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)] = ast.parse(path.read_text())
    return found


def file_of(name: str) -> Path:
    return (ROOT / PACKAGE / Path(*name.split("."))).with_suffix(".py")


def functions() -> dict[str, int]:
    """Lines of every function without its docstring, by dotted name."""
    found = {}
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = node.body[0] if ast.get_docstring(node) is not None else None
                said = (doc.end_lineno or 0) - doc.lineno + 1 if doc is not None else 0
                found[f"{name}.{node.name}"] = (node.end_lineno or 0) - node.lineno + 1 - said
    return found


def code_lines(name: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    left_out: set[int] = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            left_out |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = file_of(name).read_text().splitlines()
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in left_out
        for number, line in enumerate(lines, 1)
    )


@cache
def users() -> dict[str, set[str]]:
    """Modules of the package that import each module."""
    found: dict[str, set[str]] = defaultdict(set)
    every = {**modules()}
    for path in (ROOT / PACKAGE).rglob("__init__.py"):
        every[".".join(path.relative_to(ROOT).with_suffix("").parts)] = ast.parse(path.read_text())
    for name, tree in every.items():
        for node in ast.walk(tree):
            imported: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            for module in imported:
                if module.startswith(f"{PACKAGE}.") and module.removeprefix(f"{PACKAGE}.") in modules():
                    found[module.removeprefix(f"{PACKAGE}.")].add(name)
    return found


def test_no_module_is_long() -> None:
    long = {name: len(file_of(name).read_text().splitlines()) for name in modules()}
    assert {name: lines for name, lines in long.items() if lines > MODULE_LINES} == {}


def test_no_function_is_long() -> None:
    long = {name: lines for name, lines in functions().items() if lines > FUNCTION_LINES}
    assert {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS} == {}


def test_no_file_name_occurs_twice_outside_the_model_families() -> None:
    counts = Counter(f"{name.rpartition('.')[2]}.py" for name in modules() if not name.startswith("models."))
    twice = {name for name, count in counts.items() if count > 1}
    assert twice == set()


def test_a_crumb_belongs_into_the_module_that_uses_it() -> None:
    crumbs = {name for name in modules() if code_lines(name) < CRUMB_LINES and len(users()[name]) <= 1}
    assert {name: sorted(users()[name]) for name in crumbs - set(CRUMBS)} == {}
