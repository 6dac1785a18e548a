"""What commands that take a run file have in common: where it may lie, and the arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def shipped() -> Path:
    """The folder with recipes/, slurm/ and tools/: of the checkout, or of the wheel."""
    package = Path(__file__).parent
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


def here_or_shipped(path: Path) -> Path:
    """`recipes/...` means the shipped one where there is none of that name."""
    ours = shipped() / path
    return ours if not path.exists() and path.parts[:1] == ("recipes",) and ours.exists() else path


RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.toml", help="the run file; recipes/... are shipped", callback=here_or_shipped)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="applied left to right")]
