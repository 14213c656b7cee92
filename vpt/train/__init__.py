"""Training of a task."""
