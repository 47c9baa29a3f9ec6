"""What is drawn on a terminal: the one place that imports rich."""
