"""Codecs "planes/2" and "planes/3": `codec.py` says what they do, FORMAT.md, sections 8 to 13, states their bytes."""
