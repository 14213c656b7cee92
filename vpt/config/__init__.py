"""Configuration: typed schema, composition, validation, command line and saved files."""
