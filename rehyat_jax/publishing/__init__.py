"""Exports for other people: their model cards, and the checks before they are uploaded."""
