"""Atomic files, locks and archives."""
