"""Benchmark of FLOPs, time and memory, with prompts and with the bare ViT."""
