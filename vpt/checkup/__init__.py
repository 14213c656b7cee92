"""What `python -m vpt.doctor` does: look at every picture once, compare, and say what training would make of it."""
