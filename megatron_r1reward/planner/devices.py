"""Device table: published peak numbers with their source, and the assumptions that turn them into achieved ones.

Peaks are dense (vendors also print figures with 2:4 sparsity, twice as high). `memory_bytes` is nominal: the published
size less what such devices withhold from `torch.cuda`, not read from a device by this package. The efficiencies are
assumptions, not measurements. `plan.memory_gib` and `plan.compute_efficiency` replace them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_r1reward.config.schema import PlanSection

GIB = 2**30
_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet, SXM column, sparsity figures halved"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator. Rates are per second; `link_bytes` and `network_bytes` in one direction."""

    name: str
    memory_bytes: float  # nominal
    bf16_flops: float
    fp8_flops: float | None
    memory_rate: float  # bytes
    link_bytes: float  # to devices of the same node
    network_bytes: float  # to other nodes
    source: str
    # Share of peak that a training step reaches inside its layers, communication and pipeline bubble apart: large bf16
    # products reach about 0.8 on Hopper; norms, rotations and activations, none of them fused, are taken to double
    # the time.
    compute_efficiency: float = 0.4
    prefill_efficiency: float = 0.4
    bandwidth_efficiency: float = 0.6  # of memory_rate, while a server decodes
    link_efficiency: float = 0.7
    decode_overhead_s: float = 0.004  # assumption: per decoding step: scheduler, sampling, kernel launches
    context_bytes: float = 1.0 * GIB  # assumption: CUDA context, cuBLAS and cuDNN workspaces
    communicator_bytes: float = 1.5 * GIB  # assumption: NCCL buffers of the process groups
    fragmentation: float = 0.08  # assumption: of activations and temporaries


def _tb(rate: float) -> float:
    return rate * 1e12


DEVICES: dict[str, Device] = {
    "a100": Device(
        name="NVIDIA A100 80GB SXM",
        memory_bytes=79.2 * GIB,
        bf16_flops=312e12,
        fp8_flops=None,
        memory_rate=_tb(2.039),
        link_bytes=300e9,
        network_bytes=0,
        source="NVIDIA A100 Tensor Core GPU datasheet: 312 TFLOPS bf16, 2,039 GB/s, NVLink 600 GB/s",
    ),
    "h100": Device(
        name="NVIDIA H100 SXM",
        memory_bytes=79.1 * GIB,
        bf16_flops=989.4e12,
        fp8_flops=1978.9e12,
        memory_rate=_tb(3.35),
        link_bytes=450e9,
        network_bytes=0,
        source=f"{_HOPPER}: 989.4 TFLOPS bf16, 1,978.9 fp8, 3.35 TB/s, NVLink 900 GB/s",
    ),
    "h800": Device(
        name="NVIDIA H800 SXM",
        memory_bytes=79.1 * GIB,
        bf16_flops=989.4e12,
        fp8_flops=1978.9e12,
        memory_rate=_tb(3.35),
        link_bytes=200e9,
        network_bytes=0,
        source="as H100 with NVLink 400 GB/s",
    ),
    "h200": Device(
        name="NVIDIA H200 SXM",
        memory_bytes=139.8 * GIB,
        bf16_flops=989.4e12,
        fp8_flops=1978.9e12,
        memory_rate=_tb(4.8),
        link_bytes=450e9,
        network_bytes=0,
        source="NVIDIA H200 Tensor Core GPU datasheet: compute as H100, 141 GB, 4.8 TB/s",
    ),
    "b200": Device(
        name="NVIDIA B200 SXM",
        memory_bytes=178.3 * GIB,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        memory_rate=_tb(8.0),
        link_bytes=900e9,
        network_bytes=0,
        source="NVIDIA HGX B200 specifications, per GPU: 2.25 PFLOPS bf16, 4.5 fp8 (dense), 8 TB/s, NVLink 1.8 TB/s",
    ),
    "l40s": Device(
        name="NVIDIA L40S",
        memory_bytes=44.4 * GIB,
        bf16_flops=362e12,
        fp8_flops=733e12,
        memory_rate=_tb(0.864),
        link_bytes=32e9,
        network_bytes=0,
        source="NVIDIA L40S datasheet: 362 TFLOPS bf16 (dense), 48 GB, 864 GB/s, PCIe 4.0 x16",
    ),
    # A processor core: for run files of the CPU demo and for the comparison with measured memory, not for its speed.
    "cpu": Device(
        name="one processor core",
        memory_bytes=4.0 * GIB,
        bf16_flops=50e9,
        fp8_flops=None,
        memory_rate=10e9,
        link_bytes=2e9,
        network_bytes=0,
        source="assumption: 50 GFLOP/s in float32",
        context_bytes=0.45 * GIB,
        communicator_bytes=0.0,
    ),
}


def find_device(plan: PlanSection) -> Device:
    """The device of [plan], with the network, memory and efficiency that the section gives."""
    device = replace(DEVICES[plan.device], network_bytes=plan.network_gbit * 1e9 / 8)
    if plan.memory_gib is not None:
        device = replace(device, memory_bytes=plan.memory_gib * GIB)
    if plan.compute_efficiency is not None:
        device = replace(device, compute_efficiency=plan.compute_efficiency)
    return device
