"""Benchmark: FLOPs, time and memory of prompts beside the bare ViT."""
