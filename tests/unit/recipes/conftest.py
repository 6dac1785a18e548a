"""The recipes are programs beside the package: their helpers are imported from their folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "recipes"))
