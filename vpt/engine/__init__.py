"""Training loop, optimisers, losses, metrics, checkpoints and logging."""
