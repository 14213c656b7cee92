"""The kinds of task: classification and detection, all that differs between them on the way from config to result."""
