"""GPUs: what their makers say of memory, arithmetic and bandwidth, and the machine that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lolcats.errors import LolcatsError

GIB = 2**30
GPUS_A_HOST = 8
"""Of the servers that are common: more GPUs are several hosts."""
HOST_MEMORY = 2000.0
"""GiB of such a server; what lies there while its weights are offloaded must fit into it."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates are the makers': what of them work gets is in `efficiency`."""

    name: str
    memory: float
    """GiB that programs can have, a little less than the name says."""
    flops: float
    """bfloat16 products with float32 sums a second, without sparsity."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second to the other GPUs of its host, in one direction."""
    host: float
    """Bytes a second from its host's memory."""
    source: str
    """Where the maker says so."""


def _gpu(name: str, memory: float, tflops: float, gb: float, link: float, host: float, source: str) -> Gpu:
    return Gpu(name, memory, tflops * 1e12, gb * 1e9, link * 1e9, host * 1e9, source)


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10", 22.0, 125, 600, 32, 32, f"{_NVIDIA}/products/a10-gpu/"),
        _gpu("a100-40gb", 39.4, 312, 1555, 300, 32, f"{_NVIDIA}/a100/"),
        _gpu("a100-80gb", 79.2, 312, 2039, 300, 32, f"{_NVIDIA}/a100/"),
        _gpu("h100", 79.1, 989, 3350, 450, 64, f"{_NVIDIA}/h100/"),
        _gpu("h100-pcie", 79.1, 756, 2000, 64, 64, f"{_NVIDIA}/h100/"),
        _gpu("h200", 139.8, 989, 4800, 450, 64, f"{_NVIDIA}/h200/"),
        _gpu("b200", 178.0, 2250, 8000, 900, 64, f"{_NVIDIA}/dgx-b200/"),
        _gpu("l4", 22.0, 121, 300, 32, 32, f"{_NVIDIA}/l4/"),
        _gpu("l40s", 44.4, 362, 864, 32, 32, f"{_NVIDIA}/l40s/"),
        _gpu("rtx-3090", 23.6, 71, 936, 32, 32, "NVIDIA Ampere GA102 GPU architecture, table 9"),
        _gpu("rtx-4090", 23.5, 165, 1008, 32, 32, "NVIDIA Ada GPU architecture, appendix A"),
    )
}
"""Name -> GPU. Half of NVLink's rates is one direction; without NVLink GPUs speak over PCIe."""


@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    gpu: Gpu
    count: int = 1
    """GPUs in all; those beyond a host's are on other hosts."""
    price: float | None = None
    """Of a GPU-hour, in any currency."""


def choose_machine(
    name: str | None = None, count: int | None = None, memory: float | None = None, price: float | None = None
) -> Machine:
    """The machine that was asked for, or this one.

    Args:
        name: of a GPU; None is the one here.
        count: GPUs; None is 1, or all that are here where no name is given.
        memory: GiB of each that may be used; None is all that it has.
        price: of a GPU-hour.

    Raises:
        LolcatsError: no such GPU is known, none is here, or a number is not above 0.
    """
    for what, number in {"gpus": count, "memory": memory}.items():
        if number is not None and not number > 0:
            raise LolcatsError(f"{what}: expected a number above 0; got {number}")
    if price is not None and not price >= 0:
        raise LolcatsError(f"price: expected a number of at least 0; got {price}")
    if name is None:
        gpu, here = _gpu_here()
        count = here if count is None else count
    else:
        gpu = GPUS.get(name.lower())
        if gpu is None:
            raise LolcatsError(f"unknown GPU {name!r}; known are {', '.join(GPUS)}; for another one name the one "
                               "most like it and give its memory")  # fmt: skip
    return Machine(gpu if memory is None else replace(gpu, memory=memory), count or 1, price)


def _gpu_here() -> tuple[Gpu, int]:
    """The first GPU of this machine, by the longest name of the table that its own contains, and how many there are."""
    if not torch.cuda.is_available():
        raise LolcatsError(f"no GPU here to plan for: name one of {', '.join(GPUS)}")
    here = torch.cuda.get_device_properties(0)
    name = here.name.lower()
    found = [gpu for gpu in GPUS.values() if all(part in name for part in gpu.name.split("-"))]
    if not found:
        raise LolcatsError(f"the GPU here, {here.name}, is not in the table: name the one most like it of "
                           f"{', '.join(GPUS)}")  # fmt: skip
    gpu = max(found, key=lambda gpu: len(gpu.name))
    return replace(gpu, memory=here.total_memory / GIB), torch.cuda.device_count()
