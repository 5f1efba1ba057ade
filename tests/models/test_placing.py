"""Where a module computes, which is not always where its weights are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lolcats.placing import computes_on, main_device


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_shards_that_wait_elsewhere() -> None:
    """As those of `cpu_offload` on a GPU: what is put beside them belongs where they are used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    layer = nn.Linear(4, 4, bias=False)
    assert computes_on(layer) is None
    part = DTensor.from_local(layer.weight.detach().to("meta"), init_device_mesh("cpu", (1,)), [Shard(0)])
    layer.weight = nn.Parameter(part)
    assert layer.weight.device.type == "meta"
    assert computes_on(layer) == main_device(layer) == torch.device("cpu")
