"""The student in use."""
