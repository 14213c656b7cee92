"""Run folders, and the data and summary of a run."""
