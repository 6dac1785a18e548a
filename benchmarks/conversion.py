"""Conversion speed and memory against `cp` of the same files, and against an in-memory peer, in one run.

A synthetic Qwen2.5-VL-7B-shaped folder (16.6 GB of bfloat16 in five files; `--layers` shrinks it) is written, copied,
imported to megatron-core's distributed format and exported back, and everything is deleted. Every program reads cold
files (the kernel is asked to drop their pages) and ends when its output is on the disk (fsync). The peer loads the
folder with safetensors and saves it with torch.distributed.checkpoint, which is what converters without streaming do;
it merges nothing. Goals: import and export reach 60 % of the speed of `cp` with less than 2 GB of memory that is not
page cache, and the exported folder equals the original byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from reporting import print_table, write_json

from megatron_r1reward.conversion.weight_source import planned_weights
from megatron_r1reward.model_folder import safetensors_layout as st

CONFIG = Path(__file__).parents[1] / "tests/data/qwen2_5_vl_7b/config.json"
SPEED_GOAL, MEMORY_GOAL_GB = 0.6, 2.0
COLUMNS = ("program", "seconds", "GB/s", "of cp", "memory GB", "process seconds")
IMPORT = "from megatron_r1reward.conversion.convert import {0} as f; f(S, D, progress=False, threads={1})"
PEER = """
from safetensors.torch import load_file
import torch.distributed.checkpoint as dcp
state = {k: v for p in sorted(S.glob('*.safetensors')) for k, v in load_file(p).items()}
D.mkdir(); dcp.save(state, checkpoint_id=str(D), no_dist=True)
"""


def write_synthetic(folder: Path, layers: int | None) -> int:
    """The 7B's folder with pseudo-random values; returns its bytes."""
    folder.mkdir()
    config = json.loads(CONFIG.read_text())
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    metas = [t.meta for t in planned_weights(folder).files[0].tensors]
    total, groups, size = sum(m.num_bytes for m in metas), [[]], 0
    for meta in metas:
        if size > total / 5:
            groups.append([])
            size = 0
        groups[-1].append(meta)
        size += meta.num_bytes
    files = [
        st.build_file(f"model-{n:05d}-of-{len(groups):05d}.safetensors", group) for n, group in enumerate(groups, 1)
    ]
    block = memoryview(torch.randint(0, 256, (64 << 20,), dtype=torch.uint8).numpy())
    for number, file in enumerate(files):
        with (folder / file.name).open("wb") as handle:
            handle.write(file.header_bytes())
            for count, tensor in enumerate(file.tensors):
                start, left = (7919 * (count + 100 * number)) % (len(block) // 2), tensor.length
                while left:
                    left -= handle.write(block[start : start + min(left, len(block) // 2)])
            handle.flush()
            os.fsync(handle.fileno())
    (folder / st.INDEX).write_text(st.index_text(files))
    return total


def make_cold(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _memory_gb(pid: int) -> float:
    """Anonymous and shared memory: what is left of the resident memory without file pages."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1e6


def measure(name: str, command: list[str], source: Path, target: Path) -> dict[str, Any]:
    """Run in a process of its own. `seconds` excludes the start of Python and includes the sync of the output."""
    make_cold(source)
    started, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, _memory_gb(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    stop.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    inside = float(output.split()[-1]) if output.split() else time.monotonic() - started
    begin = time.monotonic()
    for path in target.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    sync = time.monotonic() - begin
    print(f"{name}: {inside + sync:.1f} s", flush=True)
    return {
        "program": name,
        "seconds": inside + sync,
        "memory GB": peak,
        "process seconds": time.monotonic() - started,
    }


def python(code: str, source: Path, target: Path) -> list[str]:
    """The imports, which take seconds, are done before the clock starts."""
    body = (
        "import time; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "import megatron_r1reward.conversion.convert, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl\n"
        f"S, D = Path({str(source)!r}), Path({str(target)!r}); t = time.monotonic()\n"
        f"{code}\nprint(time.monotonic() - t)"
    )
    return [sys.executable, "-c", body]


def same_files(a: Path, b: Path) -> bool:
    names = {p.name for p in a.iterdir()}
    return names == {p.name for p in b.iterdir()} and not filecmp.cmpfiles(a, b, names, shallow=False)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; needs three times the folder's size; default: /tmp")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's 28: a quick look")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--no-peer", action="store_true", help="the peer holds the whole model in memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="conversion-", dir=args.folder))
    try:
        source, copy, megatron, back, peer = (work / n for n in ("hf", "copy", "megatron", "back", "peer"))
        total = write_synthetic(source, args.layers)
        rows = [measure("cp", ["cp", "-r", str(source), str(copy)], source, copy)]
        shutil.rmtree(copy)
        code = IMPORT.format("import_folder", args.threads)
        rows.append(measure("import", python(code, source, megatron), source, megatron))
        code = IMPORT.format("export_folder", args.threads)
        rows.append(measure("export", python(code, megatron, back), megatron, back))
        identical = same_files(source, back)
        shutil.rmtree(megatron)
        shutil.rmtree(back)
        rows.append(measure("cp again", ["cp", "-r", str(source), str(copy)], source, copy))
        shutil.rmtree(copy)
        if not args.no_peer:
            rows.append(measure("safetensors + DCP", python(PEER, source, peer), source, peer))
    finally:
        shutil.rmtree(work)
    cp = min(row["seconds"] for row in rows if row["program"].startswith("cp"))
    for row in rows:
        row["GB/s"], row["of cp"] = total / 1e9 / row["seconds"], cp / row["seconds"]
    print_table(COLUMNS, rows)
    ours = [row for row in rows if row["program"] in ("import", "export")]
    speed, memory = min(row["of cp"] for row in ours), max(row["memory GB"] for row in ours)
    met = speed >= SPEED_GOAL and memory < MEMORY_GOAL_GB and identical
    write_json(args.json, "conversion", rows, bytes=total, identical=identical, goals_met=met)
    print(
        f"{total / 1e9:.1f} GB: {speed:.0%} of the speed of cp (goal {SPEED_GOAL:.0%}), {memory:.2f} GB memory "
        f"(goal < {MEMORY_GOAL_GB} GB), round trip {'identical' if identical else 'DIFFERS'}"
    )
    return 0 if met or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
