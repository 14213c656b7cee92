"""Pruning of prompt tokens."""
