"""Metrics of each type of task."""
