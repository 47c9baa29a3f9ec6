"""The student model. It knows no teacher, no shard and no trainer."""
