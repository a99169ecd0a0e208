"""Passes in order: what a pass and a target are, how they are found, written down and run."""
