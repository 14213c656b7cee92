"""Configuration: typed schema, composition, validation, command line, saved configs."""
