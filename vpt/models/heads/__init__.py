"""Heads: from features to outputs."""
