"""What `python -m vpt.serve` is made of: a batcher, the answers, and the web application around a task bank."""
