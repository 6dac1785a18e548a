"""Speed and memory from published rows to packed batches: import in several processes, reading, prompts and packing.

Synthetic chosen/rejected rows with embedded JPEG pictures are written as Parquet, 200,000 of them unless `--rows` says
otherwise. `import` is `r1reward data import`; `read` is what a stage does at its start, every image decoded; `pack`
renders prompts and packs all rows into micro-batches of 4,096 tokens with their pixels: `--processes` programs on a
core each, as data-parallel ranks do, which read all rows and pack their share. Each step is timed with its start; its
memory without page cache, all processes together, is looked at four times a second.

Goals: import is flat: its peak is at most 1.3 times that of the same import of a tenth of the rows. Import and pack
reach `--goal` rows/s, five times what one vLLM server takes. The default is five times 20: 12,000 tokens/s in responses
of 600 tokens, where the published policy settles. Beside it stands what the one server of results/rollout.json (a small
model on one core) takes of such responses.

    python benchmarks/data_pipeline.py [--rows N] [--pack-rows N] [--size PIXELS] [--processes N] [--json F] [--check]
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
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

TOKEN_BUDGET, GROUP, RESPONSE_TOKENS = 4096, 512, 600
FLAT_GOAL = 1.3
COLUMNS = ("step", "rows", "seconds", "rows/s", "MB/s", "peak MB")
# Step -> what it reads and writes.
IMPORTS = {"import of a tenth": ("tenth.parquet", "tenth"), "import": ("rows.parquet", "data")}
WORDS = tuple(
    "the picture shows a red car beside an old tree while two people walk along the river under clouds".split()  # noqa: SIM905
)


def synthetic_rows(rows: int, size: int, seed: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    for number in range(rows):
        small = Image.fromarray(generator.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        first, second = (" ".join(generator.choice(WORDS, size=60)) for _ in range(2))
        question = f"Question {number}: what {' '.join(generator.choice(WORDS, size=12))}?"
        image = {"bytes": buffer.getvalue(), "path": None}
        yield {"id": str(number), "prompt": question, "chosen": first, "rejected": second, "image": image}


def write_source(path: Path, rows: int, size: int, seed: int = 0) -> None:
    writer, group = None, []
    for number, row in enumerate(synthetic_rows(rows, size, seed), start=1):
        group.append(row)
        if len(group) == GROUP or number == rows:
            table = pa.Table.from_pylist(group)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            group = []
    assert writer is not None
    writer.close()


def pack_share(data: Path, model: Path, rows: int, rank: int, ranks: int) -> int:
    """A rank's share of the first `rows` rows as prompts with a short response, in packed micro-batches on the CPU;
    returns how many."""
    torch.set_num_threads(1)
    preferences = read_preferences(data, verify_images=False, image_root=data.parent).preferences[:rows][rank::ranks]
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


def step(name: str, folder: Path, processes: int, pack_rows: int) -> int:
    data = folder / ("tenth" if name.endswith("tenth") else "data")
    if name.startswith("read"):
        return len(read_preferences(data / "preferences.jsonl", image_root=data).preferences)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = [
            pool.submit(pack_share, data / "preferences.jsonl", folder / "model", pack_rows, rank, processes)
            for rank in range(processes)
        ]
        return sum(share.result() for share in shares)


def command_of(name: str, folder: Path, processes: int, rows: int) -> list[str]:
    if name in IMPORTS:  # the program that users start
        start = "from megatron_r1reward.cli import main; main()"
        source, out = IMPORTS[name]
        options = ["--out", str(folder / out), "--processes", str(processes)]
        return [sys.executable, "-c", start, "data", "import", str(folder / source), *options]
    options = ["--folder", str(folder), "--processes", str(processes), "--pack-rows", str(rows)]
    return [sys.executable, __file__, "--step", name, *options]


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
    command = command_of(name, folder, processes, rows)
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
    return {
        "step": name,
        "rows": rows,
        "seconds": seconds,
        "rows/s": rows / seconds,
        "MB/s": megabytes / seconds,
        "peak MB": max((size for _, size in samples), default=0) / 1e6,
    }


def server_rows_per_second() -> float:
    """What one vLLM server of the committed rollout benchmark takes of responses of `RESPONSE_TOKENS`."""
    found = json.loads((Path(__file__).parent / "results" / "rollout.json").read_text())
    return next(row["value"] for row in found["rows"] if row["measure"] == "bare vLLM") / RESPONSE_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--goal", type=float, default=100.0, help="rows/s of import and pack")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit code 1 when a goal is missed")
    parser.add_argument("--steps", default="import,read,pack", help="in this order; later ones need earlier ones")
    parser.add_argument("--size", type=int, default=112, help="of the square pictures, pixels")
    parser.add_argument("--pack-rows", type=int, help="rows that are packed, of all that were read; default: all")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(step(options.step, options.folder, options.processes, options.pack_rows), "rows")
        return
    with tempfile.TemporaryDirectory(prefix="data-pipeline-") as scratch:
        folder = Path(scratch)
        write_tiny_checkpoint(folder / "model", corpus=[" ".join(WORDS)] * 10)
        sizes = {"rows.parquet": options.rows, "tenth.parquet": max(options.rows // 10, 1)}
        for name, rows in sizes.items():
            write_source(folder / name, rows, options.size)
        megabytes = {name: (folder / name).stat().st_size / 1e6 for name in sizes}
        table = []
        steps = options.steps.split(",")
        for name in ("import of a tenth", *(["read of a tenth"] if "read" in steps else []), *steps):
            source = "tenth.parquet" if name.endswith("tenth") else "rows.parquet"
            share = min(options.pack_rows or options.rows, options.rows) / options.rows if name == "pack" else 1.0
            rows = round(share * sizes[source])
            table.append(measure(name, folder, options.processes, rows, share * megabytes[source]))
    print_table(COLUMNS, table)
    peaks = {row["step"]: row["peak MB"] for row in table}
    growth = peaks["import"] / peaks["import of a tenth"]
    slowest = min(row["rows/s"] for row in table if row["step"] in ("import", "pack"))
    server = server_rows_per_second()
    write_json(
        options.json,
        "data_pipeline",
        table,
        processes=options.processes,
        source_megabytes=megabytes["rows.parquet"],
        picture_pixels=options.size,
        goals={"memory of import / of a tenth": FLAT_GOAL, "rows/s of import and pack": options.goal},
        memory_growth=growth,
        # Beyond what the programs take for a tenth of the rows.
        bytes_per_row={
            name: (peaks[name] - peaks[f"{name} of a tenth"]) * 1e6 / (0.9 * options.rows)
            for name in ("import", "read")
            if name in peaks
        },
        server_rows_per_second=server,
    )
    print(
        f"slowest of import and pack: {slowest:.0f} rows/s, {slowest / server:.0f} x what the server of rollout.json "
        f"takes ({server:.2f} rows/s of {RESPONSE_TOKENS} tokens); import's memory: x{growth:.2f} of a tenth's"
    )
    if options.check and (slowest < max(options.goal, 5 * server) or growth > FLAT_GOAL):
        sys.exit(1)


if __name__ == "__main__":
    main()
