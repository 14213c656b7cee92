"""Metrics of a trained run on one split."""
