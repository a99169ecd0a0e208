"""The report: one HTML page about an artifact, made from its files alone."""
