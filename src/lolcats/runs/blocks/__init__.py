"""Stage 1 block by block: all blocks one after the other, side by side, or each as a job of its own.

All ways do the same and know of each other by files alone (`plan.Places`):

| job                 | leaves                                                                           |
|---------------------|----------------------------------------------------------------------------------|
| prepare             | blocks/prepared.json: with which settings, text and weights; the split of budgets |
| block N             | checkpoints/transfer/block-N; hidden/boundary-(N + 1), what block N + 1 reads     |
| stitch              | checkpoints/transfer/{best,last}.safetensors, a finished stage 1                  |
"""

from lolcats.runs.blocks.jobs import run_blocks, train_blocks

__all__ = ["run_blocks", "train_blocks"]
