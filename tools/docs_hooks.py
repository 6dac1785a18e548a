"""mkdocs hooks: a page of the API reference for every room, and links out of docs/ that lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_r1reward"


FLOW = re.compile(r"^### ([^\n]+)\n(.*?)(?=^##)", re.MULTILINE | re.DOTALL)
STEP = re.compile(r"^\d+\. `([^`]+)`", re.MULTILINE)


def check_flows(markdown: str) -> list[str]:
    """What docs/architecture.md says of its flows that is not so: files that are gone, counts that are wrong."""
    problems = []
    counts = dict(re.findall(r"^\| (an? [^|]+) \| (\d+) \|$", markdown, re.MULTILINE))
    for name, text in FLOW.findall(markdown):
        steps = STEP.findall(text)
        if counts.pop(name, None) != str(len(steps)):
            problems.append(f"the table does not say that {name!r} passes through {len(steps)} files")
        problems += [f"{name}: {step} does not exist" for step in steps if not _exists(step)]
    problems += [f"the table has {name!r}, which no section describes" for name in counts]
    problems += [
        f"{path} does not exist" for path in re.findall(r"`([\w/]+\.(?:py|sh))`", markdown) if not _exists(path)
    ]
    return problems


def _exists(path: str) -> bool:
    rooms_named_before = (PACKAGE / "kernels" / "policy_loss", PACKAGE / "weight_sync")
    return any((folder / path).exists() for folder in (PACKAGE, ROOT, *rooms_named_before))


def rooms() -> dict[str, list[str]]:
    """Modules by room, in the order of the file system; `top level` are those in no room."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__":
            room = parts[1] if len(parts) > 2 else "top level"
            found.setdefault(room, []).append(".".join(parts))
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The reference's pages take their place in the navigation, and docs that others add a place at its end."""
    assert config.nav is not None
    pages = [f"reference/{room.replace(' ', '-')}.md" for room in rooms()]
    config.nav = [
        {"API reference": pages} if entry == {"API reference": "reference/"} else entry for entry in config.nav
    ]
    named = re.findall(r"[\w-]+\.md", str(config.nav))
    more = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named)
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for room, modules in rooms().items():
        title = f"# {room}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
        files.append(File.generated(config, f"reference/{room.replace(' ', '-')}.md", content=title))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file of the repository becomes its name: the site has no repository beside it.

    A link to a file that does not exist stays, and is an error.
    """

    if page.file.src_uri == "architecture.md" and (problems := check_flows(markdown)):
        raise PluginError("docs/architecture.md: " + "; ".join(problems))

    def named(match: re.Match[str]) -> str:
        text, target = match.groups()
        there = (Path(config.docs_dir) / target.partition("#")[0]).resolve()
        return text if there.exists() else match[0]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", named, markdown)
