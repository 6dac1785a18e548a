"""Which checkpoints of a run may go: all but the last ones, the best ones and every K-th."""

from __future__ import annotations

from pathlib import Path

from megatron_r1reward.checkpoint.manifest import read_manifest
from megatron_r1reward.config.schema import CheckpointSection


def expired(root: Path, section: CheckpointSection, *, newest: Path) -> list[Path]:
    """Complete checkpoints that no rule keeps, oldest first. `newest`, just completed, is never among them.

    A folder without a readable manifest counts for no rule and is left alone: it is evidence, not a checkpoint.
    """
    scores: dict[Path, float | None] = {}
    for folder in sorted(root.glob("step-????????")):
        try:
            manifest = read_manifest(folder)
        except ValueError:
            continue
        scores[folder] = manifest.get("score")
    folders = list(scores)
    keep = {newest, *folders[-section.keep_last :]}
    if section.keep_every is not None:
        keep |= {folder for folder in folders if int(folder.name.removeprefix("step-")) % section.keep_every == 0}
    if section.keep_best:
        scored = [folder for folder in folders if scores[folder] is not None]
        # Of equal scores the later one, which has seen more data.
        keep |= set(sorted(scored, key=lambda folder: (scores[folder] or 0.0, folder.name))[-section.keep_best :])
    return [folder for folder in folders if folder not in keep]
