"""Prompts, the prompted backbone, heads, and the task file."""
