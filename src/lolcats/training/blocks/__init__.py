"""Stage 1 by blocks of layers, each trained from the teacher's hidden states at its boundary."""
