"""Published speeds of devices, the share of them that a program reaches, and a measurement of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.mode_products import lowered
from shampoo_deepspeed.linalg.precision import full_precision
from shampoo_deepspeed.options.choices import MATMUL_PRECISIONS


@dataclass(frozen=True)
class Hardware:
    """A device: peaks, and what a program reaches of them.

    The shares are assumptions of ours unless ``calibrated``: those of large batched products, of streaming kernels and
    of small factorizations on an H100, as far as others have published them.

    Args:
        name: how it is called here.
        float32, tf32, bfloat16: TFLOP/s of dense products with float32 sums; the first by IEEE float32.
        memory: GB/s of its own memory.
        link: GB/s in one direction to the other devices of a machine.
        pcie: GB/s in one direction to the CPU's memory.
        network: GB/s in one direction between machines, for each device.
        product_share: share of the peak that products of 512 x 512 and more reach.
        memory_share: share of the memory's bandwidth that element-wise work reaches.
        link_share: share of the other three bandwidths.
        factorization_share: share of ``float32`` that batched Cholesky factors and triangular solves reach.
        decomposition_share: the same for eigendecompositions, which are counted as 25 d^3 FLOPs.
        model_share: share of ``bfloat16`` that forward and backward reach (6 FLOPs for each parameter and token).
        launch: microseconds of the CPU for each operator that a step launches.
        read: microseconds for which the CPU and the device wait for each other at each read.
        machine: devices in a machine.
        accelerator: whether it has the solvers of accelerators (``auto``, CholeskyQR).
        calibrated: whether the numbers were measured here.
    """

    name: str
    float32: float
    tf32: float
    bfloat16: float
    memory: float
    link: float
    pcie: float
    network: float
    product_share: float = 0.7
    memory_share: float = 0.85
    link_share: float = 0.75
    factorization_share: float = 0.1
    decomposition_share: float = 0.033
    model_share: float = 0.4
    launch: float = 8.0
    read: float = 20.0
    machine: int = 8
    accelerator: bool = True
    calibrated: bool = False

    def products(self, precision: str) -> float:
        """FLOP/s of products in this ``matmul_precision``."""
        peak = {"highest": self.float32, "high": self.tf32, "medium": self.bfloat16}[precision]
        return self.product_share * peak * 1e12

    @property
    def bytes_per_second(self) -> float:
        """What element-wise work reads and writes."""
        return self.memory_share * self.memory * 1e9

    def exchange(self, ranks: int) -> float:
        """Bytes per second that a rank sends, and at once receives, among so many ranks."""
        return self.link_share * (self.link if ranks <= self.machine else self.network) * 1e9


# Peaks are for dense matrices; data sheets print twice as much for sparse ones. Links are per direction, where data
# sheets add both. Networks are the usual one of such machines: a network card of 400 or 200 Gbit/s for each device.
HARDWARE = {
    found.name: found
    for found in (
        # NVIDIA H100 Tensor Core GPU data sheet, SXM: 67, 989/2 and 1,979/2 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s,
        # PCIe 5 128 GB/s.
        Hardware("h100", 67.0, 494.5, 989.5, 3350.0, 450.0, 64.0, 50.0),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM: H100's but for 4.8 TB/s.
        Hardware("h200", 67.0, 494.5, 989.5, 4800.0, 450.0, 64.0, 50.0),
        # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM: 19.5, 156 and 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s,
        # PCIe 4 64 GB/s.
        Hardware("a100", 19.5, 156.0, 312.0, 2039.0, 300.0, 32.0, 25.0),
        # NVIDIA HGX B200 specifications, an eighth of eight devices: 600/8, 18,000/2/8 and 36,000/2/8 TFLOP/s, 8 TB/s,
        # NVLink 1.8 TB/s, PCIe 5 128 GB/s.
        Hardware("b200", 75.0, 1125.0, 2250.0, 8000.0, 900.0, 64.0, 50.0),
        # AMD Instinct MI300X data sheet: 163.4 (matrix float32), 653.7 and 1,307.4 TFLOP/s, 5.3 TB/s, seven links of
        # 128 GB/s, PCIe 5 128 GB/s.
        Hardware("mi300x", 163.4, 653.7, 1307.4, 5300.0, 448.0, 64.0, 50.0),
        # NVIDIA L40S data sheet: 91.6, 183 and 362 TFLOP/s, 864 GB/s, no NVLink, PCIe 4 64 GB/s.
        Hardware("l40s", 91.6, 183.0, 362.0, 864.0, 32.0, 32.0, 25.0),
        # NVIDIA Ada GPU architecture white paper, table 2, RTX 4090: 82.6, 82.6 and 165.2 TFLOP/s with float32 sums,
        # 1,008 GB/s, no NVLink, PCIe 4 64 GB/s; an Ethernet of 10 Gbit/s.
        Hardware("rtx4090", 82.6, 82.6, 165.2, 1008.0, 32.0, 32.0, 1.25),
        # One core with AVX2 at 3 GHz: 2 multiply-adds of 8 float32 a cycle are 96 GFLOP/s (Agner Fog, Instruction
        # tables, Zen 3 and Skylake). It has no faster format. 10 GB/s of memory, ranks exchange through memory.
        Hardware(
            "cpu", 0.096, 0.096, 0.096, 10.0, 5.0, 10.0, 1.25,
            factorization_share=0.4, decomposition_share=0.5, model_share=0.7, launch=3.0, read=0.0, accelerator=False,
        ),
    )
}  # fmt: skip


def calibrated(seconds: float = 30.0) -> Hardware:
    """This machine, measured: its accelerator, or one process on its CPU.

    It measures batched products of 512 x 512 and 1,024 x 1,024 in each precision, a streaming pass, copies to and from
    the CPU's memory, launches, reads, CholeskyQR's and eigendecompositions' speed. Links between devices are those of
    the table, as one process cannot measure them.

    Args:
        seconds: what it may take in all, at least 1.

    Raises:
        ValueError: if ``seconds`` is less than 1.
    """
    if not seconds >= 1.0:
        raise ValueError(f"seconds {seconds!r} is not allowed: a number >= 1")
    found = torch.accelerator.current_accelerator(check_available=True)
    device = found or torch.device("cpu")
    base, budget = HARDWARE["cpu" if device.type == "cpu" else "h100"], seconds / 12.0
    on_cpu = device.type == "cpu"
    size, batch = (512, 2) if on_cpu else (1024, 64)
    left, right = (torch.randn(batch, size, size, device=device) for _ in range(2))
    with full_precision(device.type):
        flops = 2.0 * batch * size**3
        rates = {
            precision: flops / _seconds(partial(lowered, left, right, precision), device, budget)
            for precision in MATMUL_PRECISIONS
        }
        few = left[:, : size // 2, : size // 2] @ left[:, : size // 2, : size // 2].mT + torch.eye(
            size // 2, device=device
        )
        half = float(len(few) * (size // 2) ** 3)
        factor = _seconds(
            lambda: torch.linalg.solve_triangular(torch.linalg.cholesky_ex(few)[0], few, upper=False), device, budget
        )
        decomposition = _seconds(lambda: torch.linalg.eigh(few[:1]), device, budget)
    stream = torch.zeros((1 << 26) if on_cpu else (1 << 28), device=device)  # no cache holds it
    passes = _seconds(lambda: stream.add_(1.0), device, budget)
    tiny = torch.zeros(1, device=device)
    launches = _seconds(lambda: [tiny.add_(1.0) for _ in range(100)], device, budget) / 100
    reads = _seconds(lambda: tiny.tolist(), device, budget)
    copies = _copy_seconds(device, budget)
    top = rates["highest"]
    return replace(
        base,
        name=_name(device),
        float32=top / 1e12,
        # A CPU rounds operands itself, which no accelerator does; it has no faster format.
        tf32=(top if on_cpu else rates["high"]) / 1e12,
        bfloat16=(top if on_cpu else rates["medium"]) / 1e12,
        memory=2.0 * stream.nbytes / passes / 1e9,
        pcie=copies or base.pcie,
        product_share=1.0,
        memory_share=1.0,
        factorization_share=4.0 / 3.0 * half / factor / top,
        decomposition_share=25.0 * (size // 2) ** 3 / decomposition / top,
        model_share=0.6,
        launch=launches * 1e6,
        read=0.0 if on_cpu else reads * 1e6,
        calibrated=True,
    )


def _seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """The median time of a run, after a first one that does not count, within a budget of seconds."""
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begin)
        if len(times) >= 30 or sum(times) > budget:
            break
    return statistics.median(times[1:] or times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _copy_seconds(device: torch.device, budget: float) -> float | None:
    """GB/s from pinned memory to the device; None on the CPU."""
    if device.type == "cpu":
        return None
    pinned: Tensor = torch.zeros(1 << 26, pin_memory=True)
    there = torch.empty(1 << 26, device=device)
    return pinned.nbytes / _seconds(lambda: there.copy_(pinned, non_blocking=True), device, budget) / 1e9


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"this CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    module = torch.get_device_module(device)
    return str(module.get_device_name()) if hasattr(module, "get_device_name") else device.type
