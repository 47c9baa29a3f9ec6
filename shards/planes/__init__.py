"""Codec "planes/3": `codec.py` says what it does, FORMAT.md, sections 8 to 12, states its bytes."""
