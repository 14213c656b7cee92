"""What computes: prompts, the prompted backbone, heads."""
