"""Commands, one file each, and what they share: options, values from the command line, tables."""
