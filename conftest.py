"""Without a GPU, Triton's kernels are tested in its interpreter: Triton reads that when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
