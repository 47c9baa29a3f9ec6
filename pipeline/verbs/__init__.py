"""The verbs of cli.py: each parses, calls and prints; nothing heavy is imported before one runs."""
