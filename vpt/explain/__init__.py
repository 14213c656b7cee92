"""Attention maps and prompt tokens of a task."""
