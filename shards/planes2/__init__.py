"""Codec "planes/2": see `codec.py` for what it does and FORMAT.md, sections 7 to 12, for its bytes."""
