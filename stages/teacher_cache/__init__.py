"""Stage one: the corpus goes through the teacher once and becomes shards."""
