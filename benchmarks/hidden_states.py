"""How fast hidden states go to the disk and come back, checked.

    python benchmarks/hidden_states.py --folder /scratch/states --steps 16 --tokens 8192 --width 8192

Files of a step are written by a store and read by another one, with and without reading ahead. "cold" has the files
dropped from the page cache before. The time until all is on the disk is counted.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from lolcats.training.blocks.store import HiddenStore


def gigabytes_per_second(count: int, run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return count / (time.perf_counter() - begun) / 1e9


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one without it")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--width", type=int, default=8192, help="numbers of a token, 2 bytes each")
    options = parser.parse_args()
    hidden = torch.randn(options.tokens, options.width).bfloat16()
    step, keys = hidden.numel() * 2, [f"train-{number:06}" for number in range(options.steps)]
    total = step * options.steps
    print(f"{options.steps} steps of {step / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        crc = gigabytes_per_second(step, lambda: zlib.crc32(hidden.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        print(f"CRC-32, one thread:  {crc:.2f} GB/s")

        def write() -> None:
            with HiddenStore(folder, {}) as store:
                for key in keys:
                    store.write(key, {"hidden": hidden})

        def read(ahead: bool) -> None:
            with HiddenStore(folder, {}) as store:
                store.prefetch(keys if ahead else [])
                assert all(store.read(key)["hidden"].shape == hidden.shape for key in keys)

        print(f"write:               {gigabytes_per_second(total, write):.2f} GB/s")
        for name, ahead in (("read:       ", False), ("read ahead: ", True)):
            warm = gigabytes_per_second(total, lambda ahead=ahead: read(ahead))
            forget(folder)
            cold = gigabytes_per_second(total, lambda ahead=ahead: read(ahead))
            print(f"{name}         {warm:.2f} GB/s, cold {cold:.2f} GB/s")
        with HiddenStore(folder, {}) as store:
            assert torch.equal(store.read(keys[-1])["hidden"], hidden)


if __name__ == "__main__":
    main()
