"""One loss a file, each computed without the [B, T, V] logits."""
