"""Speed and memory from published rows to packed batches: import in several processes, reading, prompts and packing.

Synthetic chosen/rejected rows with embedded JPEG pictures are written as Parquet, 200,000 of them unless `--rows` says
otherwise. `import` is `r1reward data import`; `read` is what a stage does at its start, every image decoded; `pack`
renders prompts and packs all rows into micro-batches of 4,096 tokens with their pixels, on one core. Each is a program
of its own, timed with its start; its memory without page cache, children included, is looked at four times a second.

Goals: import is flat: the peak of the second half of its time is at most 1.3 times that of the first half; import and
pack reach `--goal` rows/s, which should be five times what one of your vLLM servers takes (the default supposes 20).

    python benchmarks/data_pipeline.py [--rows N] [--processes N] [--steps import,read,pack] [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from reporting import print_table, write_json
from transformers import AutoTokenizer

from megatron_r1reward.data.packing import Packer
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.models.registry import family_of, load_hf_config

SIZE, TOKEN_BUDGET, GROUP = 224, 4096, 512
FLAT_GOAL = 1.3
COLUMNS = ("step", "rows", "seconds", "rows/s", "MB/s", "peak MB", "peak of 2nd half / 1st")
WORDS = tuple(
    "the picture shows a red car beside an old tree while two people walk along the river under clouds".split()  # noqa: SIM905
)


def synthetic_rows(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    for number in range(rows):
        small = Image.fromarray(generator.integers(0, 256, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        first, second = (" ".join(generator.choice(WORDS, size=60)) for _ in range(2))
        question = f"Question {number}: what {' '.join(generator.choice(WORDS, size=12))}?"
        image = {"bytes": buffer.getvalue(), "path": None}
        yield {"id": str(number), "prompt": question, "chosen": first, "rejected": second, "image": image}


def write_source(path: Path, rows: int, seed: int = 0) -> None:
    writer, group = None, []
    for number, row in enumerate(synthetic_rows(rows, seed), start=1):
        group.append(row)
        if len(group) == GROUP or number == rows:
            table = pa.Table.from_pylist(group)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            group = []
    assert writer is not None
    writer.close()


def pack_all(data: Path, model: Path) -> int:
    """Every row as a prompt with a short response, in packed micro-batches on the CPU; returns the packed rows."""
    torch.set_num_threads(1)
    preferences = read_preferences(data, verify_images=False, image_root=data.parent).preferences
    tokenizer, config = AutoTokenizer.from_pretrained(model), load_hf_config(model)
    builder = PromptBuilder(tokenizer, TOKEN_BUDGET)
    packer = Packer(
        image_processor=ImageProcessor(model, min_pixels=56 * 56, max_pixels=1 << 20, cache_size=GROUP),
        image_token_id=config.image_token_id,
        positions=family_of(config).positions,
        pad_token_id=tokenizer.pad_token_id,
        token_budget=TOKEN_BUDGET,
        device=torch.device("cpu"),
    )
    packed = 0
    for start in range(0, len(preferences), GROUP):
        part = preferences[start : start + GROUP]
        sequences = [packer.sequence(builder.build(row, swapped=False), [1, 2, 3]) for row in part]
        for indices in packer.plan(sequences, range(len(sequences))):
            packed += len(packer.pack(sequences, indices).sequence_indices)
    return packed


def step(name: str, folder: Path) -> int:
    data = folder / "data"
    if name == "read":
        return len(read_preferences(data / "preferences.jsonl", image_root=data).preferences)
    return pack_all(data / "preferences.jsonl", folder / "model")


def command_of(name: str, folder: Path, processes: int) -> list[str]:
    if name == "import":  # the program that users start
        start = "from megatron_r1reward.cli import main; main()"
        options = ["--out", str(folder / "data"), "--processes", str(processes)]
        return [sys.executable, "-c", start, "data", "import", str(folder / "rows.parquet"), *options]
    return [sys.executable, __file__, "--step", name, "--folder", str(folder)]


def private_bytes(process: psutil.Process) -> int:
    """Memory of a process and its children that is not page cache."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            memory = one.memory_info()
        except psutil.NoSuchProcess:
            continue
        total += memory.rss - memory.shared
    return total


def measure(name: str, folder: Path, processes: int, rows: int, megabytes: float) -> dict[str, Any]:
    command = command_of(name, folder, processes)
    samples: list[tuple[float, int]] = []
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        done, process = threading.Event(), psutil.Process(child.pid)

        def watch() -> None:
            while not done.wait(0.25):
                try:
                    samples.append((time.monotonic() - started, private_bytes(process)))
                except psutil.NoSuchProcess:
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        output = child.communicate()[0]
        done.set()
        watcher.join()
    if child.returncode:
        raise SystemExit(f"{name} ended with {child.returncode}")
    seconds = time.monotonic() - started
    assert f"{rows} " in output, f"{name}: not all of {rows} rows: {output}"
    half = samples[-1][0] / 2 if samples else 0.0
    first = max((size for at, size in samples if at <= half), default=0)
    second = max((size for at, size in samples if at > half), default=0)
    return {
        "step": name,
        "rows": rows,
        "seconds": seconds,
        "rows/s": rows / seconds,
        "MB/s": megabytes / seconds,
        "peak MB": max(first, second) / 1e6,
        "peak of 2nd half / 1st": second / first if first else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--goal", type=float, default=100.0, help="rows/s of import and pack")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit code 1 when a goal is missed")
    parser.add_argument("--steps", default="import,read,pack", help="in this order; later ones need earlier ones")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(step(options.step, options.folder), "rows")
        return
    with tempfile.TemporaryDirectory(prefix="data-pipeline-") as scratch:
        folder = Path(scratch)
        write_tiny_checkpoint(folder / "model", corpus=[" ".join(WORDS)] * 10)
        write_source(folder / "rows.parquet", options.rows)
        megabytes = (folder / "rows.parquet").stat().st_size / 1e6
        steps = options.steps.split(",")
        table = [measure(name, folder, options.processes, options.rows, megabytes) for name in steps]
    print_table(COLUMNS, table)
    write_json(options.json, "data_pipeline", table, processes=options.processes, source_megabytes=megabytes)
    slowest = min(row["rows/s"] for row in table if row["step"] != "read")
    growth = table[0]["peak of 2nd half / 1st"]
    print(f"slowest of import and pack: {slowest:.0f} rows/s; import's memory in the second half: x{growth or 0:.2f}")
    if options.check and (slowest < options.goal or growth is None or growth > FLAT_GOAL):
        sys.exit(1)


if __name__ == "__main__":
    main()
