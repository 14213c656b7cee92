"""Listing, checking and converting task files."""
