"""Stage two: shards go through the student many times and become a model."""
