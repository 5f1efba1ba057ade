"""How large the update of a LoRA layer is, and in how many directions it goes."""

from __future__ import annotations

import torch
from torch import Tensor


def update_size(down: Tensor, up: Tensor, scale: float) -> tuple[float, float]:
    """Frobenius norm and effective rank of scale B A, in float64 and without the product.

    The effective rank is exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007), 0
    where the update is 0.

    Args:
        down: A [r, in]; up: B [out, r].
        scale: alpha / r.
    """
    down, up = (x.detach().cpu().double() for x in (down, up))
    # B = Q R and A' = Q' R': of the whole and of R R'' [r, r] the singular values are the same.
    inner = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.mT, mode="r").R.mT
    singular = torch.linalg.svdvals(inner * scale)
    if not float(singular.sum()):
        return 0.0, 0.0
    return float(singular.norm()), float(torch.special.entr(singular / singular.sum()).sum().exp())
