"""Types of task: all that differs between them on the way from config to result."""
