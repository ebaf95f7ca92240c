"""Folded models rewritten as ordinary checkpoints that stock engines run."""
