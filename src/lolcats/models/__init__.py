"""Pretrained models and tokenizers: loading them and checking what was read."""
