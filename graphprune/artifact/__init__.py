"""Artifacts: saving and loading Programs, exporting to targets, manifests, verification and inspection."""
