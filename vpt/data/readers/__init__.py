"""Readers of folders, lists, tables and annotation files."""
