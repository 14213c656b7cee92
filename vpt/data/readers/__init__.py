"""Readers: from folders, lists, tables and annotation files to samples."""
