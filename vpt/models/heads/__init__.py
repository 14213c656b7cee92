"""Heads that turn features into outputs."""
