"""What runs: the training loop, optimisers, metrics, checkpoints, the monitor."""
