"""Task types: the differences between classification and detection, from configuration to result."""
