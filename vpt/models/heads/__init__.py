"""Heads of classifiers and detectors."""
