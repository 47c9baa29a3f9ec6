"""The two stages, the corpus that feeds them, the student they make and the ways to use it."""
