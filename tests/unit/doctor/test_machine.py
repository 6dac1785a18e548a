"""GPUs, imports, limits, network and storage: what is broken is found, and what works is not blamed."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest

from megatron_r1reward.doctor import machine, network, packages, storage

H100 = "{i}, NVIDIA H100 80GB HBM3, 580.65, 81559, {used}, {cap}, {mig}, {ecc}"


def levels(findings):
    return {finding.check: finding.level for finding in findings}


def gpu_line(i=0, used=5, cap="9.0", mig="Disabled", ecc="0"):
    return H100.format(i=i, used=used, cap=cap, mig=mig, ecc=ecc)


class TestGpus:
    def test_none_is_fine_unless_the_job_has_some(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert levels(machine.check_driver(gpus_expected=False)[0]) == {"gpu.driver": "note"}
        assert levels(machine.check_driver(gpus_expected=True)[0]) == {"gpu.driver": "error"}

    def test_a_healthy_machine(self, command):
        command("nvidia-smi", f"cat <<E\n{gpu_line(0)}\n{gpu_line(1)}\nE")
        findings, found = machine.check_driver(gpus_expected=True)
        assert levels(findings) == {"gpu.driver": "ok"}
        assert [gpu["index"] for gpu in found] == ["0", "1"]

    @pytest.mark.parametrize(
        ("line", "check", "level"),
        [
            (gpu_line(used=40_000), "gpu.busy", "warning"),
            (gpu_line(mig="Enabled"), "gpu.mig", "error"),
            (gpu_line(ecc="3"), "gpu.ecc", "error"),
            (gpu_line(cap="7.5"), "gpu.capability", "error"),
            (gpu_line(mig="[N/A]", ecc="[N/A]"), "gpu.driver", "ok"),
        ],
    )
    def test_faults(self, command, line, check, level):
        command("nvidia-smi", f"echo '{line}'")
        assert levels(machine.check_driver(gpus_expected=True)[0])[check] == level

    def test_a_driver_that_does_not_match_its_libraries(self, command):
        command("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
        (finding,) = machine.check_driver(gpus_expected=False)[0]
        assert finding.level == "error"
        assert "version mismatch" in finding.message

    def test_torch_sees_fewer(self):
        driver = [{"driver_version": "520"}, {"driver_version": "520"}]
        seen = {"cuda": "13.0", "gpus": [], "peers": True}
        assert levels(machine.check_torch_gpus(seen, driver, None)) == {"gpu.torch": "error"}
        two = seen | {"gpus": [{}, {}]}
        assert levels(machine.check_torch_gpus(two, driver, None)) == {"gpu.torch": "ok"}
        assert levels(machine.check_torch_gpus(two | {"peers": False}, driver, None))["gpu.peers"] == "warning"
        assert levels(machine.check_torch_gpus(seen | {"gpus": [{}]}, driver, "1")) == {"gpu.torch": "ok"}

    @pytest.mark.parametrize(("link", "level"), [("NV18", "ok"), ("PHB", "warning")])
    def test_links(self, command, link, level):
        rows = rf"\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \t{link}\t0-7\nGPU1\t{link}\t X \t0-7\n"
        command("nvidia-smi", f"printf '{rows}'")
        assert levels(machine.check_links(2)) == {"gpu.links": level}


class TestImports:
    @pytest.mark.slow
    def test_torch_loads_here(self):
        findings, seen = packages.check_torch()
        assert levels(findings) == {"imports.torch": "ok"}
        assert seen["version"].startswith("2.13.0")

    def test_a_torch_that_cannot_load(self, tmp_path):
        (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
        (finding,), seen = packages.check_torch({**os.environ, "PYTHONPATH": str(tmp_path)})
        assert finding.level == "error"
        assert "libcudart.so.13" in finding.message
        assert seen == {}

    @pytest.mark.parametrize(
        ("seen", "problem", "build", "has_gpus", "level"),
        [
            ({"version": "0.32.0", "device": "cpu"}, None, "cpu", False, "ok"),
            ({"version": "0.32.0", "device": "cuda"}, None, "gpu", True, "ok"),
            ({"version": "0.32.0", "device": "cpu"}, None, "gpu", True, "error"),
            ({"version": "0.32.0", "device": ""}, None, "gpu", False, "ok"),  # a login node
            (None, "exit code 1: undefined symbol: _ZN3c10", "gpu", True, "error"),
            (None, "exit code 1: libcuda.so.1: cannot open shared object file", "gpu", False, "note"),
            (None, "exit code 1: libcuda.so.1: cannot open shared object file", "gpu", True, "error"),
        ],
    )
    def test_what_an_import_says(self, seen, problem, build, has_gpus, level):
        assert packages._judge("vllm", seen, problem, build=build, has_gpus=has_gpus).level == level

    def test_a_crash_is_a_finding(self):
        seen, problem = packages.probe("import os; os.kill(os.getpid(), 11)")
        assert seen is None
        assert "-11" in problem


class TestLimits:
    @pytest.mark.parametrize(
        ("kind", "soft", "infiniband", "check", "level"),
        [
            ("RLIMIT_NOFILE", 256, False, "limits.nofile", "error"),
            ("RLIMIT_NOFILE", 4096, False, "limits.nofile", "warning"),
            ("RLIMIT_MEMLOCK", 65536, True, "limits.memlock", "error"),
            ("RLIMIT_MEMLOCK", 65536, False, "limits.memlock", "ok"),
            ("RLIMIT_NPROC", 100, False, "limits.nproc", "warning"),
        ],
    )
    def test_faults(self, kind, soft, infiniband, check, level):
        low = getattr(resource, kind)

        def getrlimit(which):
            return (soft, soft) if which == low else (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

        found = levels(machine.check_limits(on_infiniband=infiniband, getrlimit=getrlimit))
        assert found.pop(check) == level
        assert set(found.values()) == {"ok"}

    def test_a_low_hard_limit_is_the_sites_to_raise(self):
        findings = machine.check_limits(on_infiniband=False, getrlimit=lambda which: (1024, 2048))
        assert "the hard limit is 2048" in findings[0].fix

    def test_shared_memory_and_temporary_folder(self, tmp_path):
        assert machine.check_shared_memory(tmp_path / "none").level == "error"
        assert machine.check_temporary({"TMPDIR": str(tmp_path / "none")}).level == "error"
        assert machine.check_temporary({"TMPDIR": str(tmp_path)}).level in ("ok", "warning")

    def test_a_small_control_group(self, tmp_path):
        meminfo = tmp_path / "meminfo"
        meminfo.write_text("MemTotal:       67108864 kB\n")
        cgroup = tmp_path / "cgroup"
        for folder, name in ((cgroup, "memory.max"), (cgroup / "memory", "memory.limit_in_bytes")):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(f"{4 * 2**30}\n")
        finding = machine.check_memory(meminfo, cgroup)
        assert finding.level == "warning"
        assert finding.message == "4 of 64 GiB of memory may be used"
        assert machine.check_memory(meminfo, tmp_path / "none").message == "64 GiB of memory"


class TestNetwork:
    NAMES = ("lo", "eth0", "ib0", "docker0")

    @pytest.mark.parametrize(
        ("environment", "check", "level"),
        [
            ({"NCCL_SOCKET_IFNAME": "bond0"}, "network.NCCL_SOCKET_IFNAME", "error"),
            ({"NCCL_SOCKET_IFNAME": "eth"}, "network.variables", "ok"),
            ({"NCCL_SOCKET_IFNAME": "=eth"}, "network.NCCL_SOCKET_IFNAME", "error"),
            ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, "network.variables", "ok"),
            ({"GLOO_SOCKET_IFNAME": "eth"}, "network.GLOO_SOCKET_IFNAME", "error"),
            ({"GLOO_SOCKET_IFNAME": "ib0"}, "network.variables", "ok"),
            ({"NCCL_IB_DISABLE": "1"}, "network.NCCL_IB_DISABLE", "warning"),
            ({"NCCL_P2P_DISABLE": "1"}, "network.NCCL_P2P_DISABLE", "warning"),
            ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "network.allocator", "warning"),
            ({"http_proxy": "http://p:3128"}, "network.proxy", "warning"),
            ({"http_proxy": "http://p:3128", "no_proxy": ".cluster"}, "network.variables", "ok"),
            ({}, "network.variables", "ok"),
        ],
    )
    def test_variables(self, environment, check, level):
        findings = network.check_variables(environment, self.NAMES, active_infiniband=True)
        assert levels(findings) == {check: level}

    def test_sleep_mode_does_without_expandable_segments(self):
        """vLLM turns them off for itself; what they cost is time, in CUDA IPC."""
        environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        (finding,) = network.check_variables(environment, self.NAMES, active_infiniband=True)
        assert "CUDA IPC" in finding.message
        assert "refuses" not in finding.message

    def test_names(self):
        assert network.check_name("n1", lambda host: "10.0.0.4", several_nodes=True).level == "ok"
        assert network.check_name("n1", lambda host: "127.0.1.1", several_nodes=True).level == "error"
        assert network.check_name("n1", lambda host: "127.0.1.1").level == "ok"

        def unknown(host):
            raise socket.gaierror("Name or service not known")

        assert network.check_name("n1", unknown, several_nodes=True).level == "error"

    def test_ports(self, tmp_path):
        outgoing = tmp_path / "range"
        outgoing.write_text("32768\t60999\n")
        with socket.create_server(("", 0)) as busy:
            taken = {"MASTER_PORT": str(busy.getsockname()[1])}
            found = network.check_ports(taken, outgoing)
            assert [f.level for f in found if f.check == "network.MASTER_PORT"][-1] == "error"
        assert levels(network.check_ports({}, outgoing)) == {"network.ports": "ok"}

    @pytest.mark.parametrize(("state", "level"), [("4: ACTIVE", "ok"), ("1: DOWN", "error")])
    def test_infiniband(self, tmp_path, state, level):
        port = tmp_path / "mlx5_0" / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in {"state": state, "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}.items():
            (port / name).write_text(text + "\n")
        ports = network.infiniband_ports(tmp_path)
        assert levels(network.check_interconnect(ports, with_gpus=True))["network.interconnect"] == level

    def test_without_infiniband(self, tmp_path):
        none = network.infiniband_ports(tmp_path / "none")
        assert levels(network.check_interconnect(none, with_gpus=False)) == {"network.interconnect": "note"}
        assert levels(network.check_interconnect(none, with_gpus=True)) == {"network.interconnect": "warning"}


class TestStorage:
    def test_a_usable_folder(self, tmp_path):
        found = levels(storage.check_folder(tmp_path, on_cluster=False))
        assert found["storage.canary"] == found["storage.locks"] == found["clock.file-server"] == "ok"
        assert list(tmp_path.iterdir()) == []  # nothing is left behind

    def test_a_folder_that_cannot_be_written(self):
        (finding,) = storage.check_folder(Path("/proc"), on_cluster=False)
        assert (finding.check, finding.level) == ("storage.canary", "error")

    def test_local_and_network_file_systems(self, tmp_path):
        mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
        assert levels(storage.check_folder(tmp_path, on_cluster=True, mounts=mounts))["storage.shared"] == "ok"
        mounts = f"/dev/sda / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n"
        assert levels(storage.check_folder(tmp_path, on_cluster=True, mounts=mounts))["storage.shared"] == "warning"
        assert levels(storage.check_folder(tmp_path, on_cluster=False, mounts=mounts))["storage.shared"] == "note"

    def test_a_file_server_with_another_clock(self):
        assert storage.check_skew(1000.0, 999.0, 1001.0).level == "ok"
        assert storage.check_skew(1100.0, 999.0, 1001.0).level == "warning"

    def test_caches_on_a_network_home(self, tmp_path):
        mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
        finding = storage.check_caches({"HOME": str(tmp_path)}, mounts)
        assert finding.level == "warning"
        assert "TRITON_CACHE_DIR" in finding.fix
        assert storage.check_caches({"HOME": "/root"}, mounts).level == "ok"


@pytest.mark.parametrize(("answer", "level"), [("yes", "ok"), ("no", "warning")])
def test_clock(command, answer, level):
    command("timedatectl", f"echo {answer}")
    assert storage.check_clock().level == level
