"""One server as a job step, with another program in vLLM's place: its address, its next start, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from waiting import wait_until

from megatron_r1reward.run_dir import Address, RunDir

VLLM = """
import http.server, os, sys
from megatron_r1reward.servers.keeper import keep
keep()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200); self.send_header("content-length", "2"); self.end_headers(); self.wfile.write(b"{}")
    do_POST = do_GET
class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = True
print("vllm", os.getpid(), flush=True)
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
# The step itself, but for the command line of vLLM.
STEP = """
import sys
from megatron_r1reward.servers import process
seen = {}
def command(section, *, port, **options):
    print("asked for", sorted(k for k, v in options.items() if v), flush=True)
    return [sys.executable, VLLM, str(port)]
process.server_command = command
from megatron_r1reward.cli import app
app(["server", *sys.argv[1:]])
"""


class Step:
    def __init__(self, folder: Path, kind: str, start: int) -> None:
        self.run = RunDir(root=folder / "run")
        self.name = f"{kind}-0"
        arguments = ["--life", "0", "--start", str(start), "rl", kind, "0", str(folder / "run.toml")]
        text = STEP.replace("VLLM", repr(str(folder / "vllm.py")))
        environment = os.environ | {"R1REWARD_SERVER_TOKEN": "secret"}
        self.process = subprocess.Popen([sys.executable, "-c", text, *arguments], env=environment)

    def address(self, start: int) -> Address:
        def there() -> bool:
            assert self.process.poll() is None, "the step has ended"
            address = Address.read(self.run.address(self.name))
            return address is not None and address.start == start

        wait_until(there)
        address = Address.read(self.run.address(self.name))
        assert address is not None
        return address

    def vllm(self) -> int:
        lines = self.run.log(0, f"{self.name}.vllm").read_text().splitlines()
        return int([line for line in lines if line.startswith("vllm")][-1].split()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "vllm.py").write_text(VLLM)
    sections = {
        "run": {"output_dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "judge": {"model_path": str(tmp_path / "model")},
    }
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items()) for name, keys in sections.items()
    ]
    (tmp_path / "run.toml").write_text("".join(lines))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rollout", "judge"])
def test_a_step_starts_again_where_it_was(folder: Path, kind: str) -> None:
    first = Step(folder, kind, 0)
    before = first.address(0)
    os.kill(first.vllm(), signal.SIGKILL)
    assert first.process.wait(120) == 128 + signal.SIGKILL, "the exit code says how vLLM ended"
    second = Step(folder, kind, 1)
    after = second.address(1)
    assert urlsplit(after.url).port == urlsplit(before.url).port
    vllm = second.vllm()
    second.process.terminate()
    assert second.process.wait(120) == 0
    assert not Path(f"/proc/{vllm}").exists()


@pytest.mark.slow
def test_a_step_that_is_killed_takes_its_server_along(folder: Path) -> None:
    step = Step(folder, "rollout", 0)
    step.address(0)
    vllm = step.vllm()
    step.process.kill()
    step.process.wait()
    wait_until(lambda: not Path(f"/proc/{vllm}").exists())
