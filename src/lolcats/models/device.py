"""Choice of device and number format."""

from __future__ import annotations

import importlib.util
import math
import os

import torch

from lolcats.errors import LolcatsError


def choose_device(name: str) -> torch.device:
    """The device for `name`: "auto" is the first GPU, else the CPU.

    Raises:
        LolcatsError: a GPU was asked for and there is none, or no such device exists.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LolcatsError(f"device must be auto, cpu, cuda, cuda:N or mps; got {name!r}") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise LolcatsError(f"device {name!r} was asked for, but this machine has none; use device=auto or device=cpu")
    return device


def check_impl(impl: str, device: torch.device, where: str = "linearization.impl") -> None:
    """Refuse an implementation that cannot run on a device, before anything is loaded.

    Raises:
        LolcatsError: Triton's kernels are asked for, and are not installed or have no GPU.
    """
    if impl != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise LolcatsError(f"{where} is triton, and the package triton is not installed here; use auto")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise LolcatsError(f"{where} is triton, which needs a CUDA device; this is {device.type}: use auto")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Format of the frozen weights: "auto" is bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def describe_device(device: torch.device) -> str:
    """A name for reports, such as "NVIDIA H100 80GB HBM3" or "cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def memory_size() -> float:
    """Bytes of this machine's memory; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return math.inf
