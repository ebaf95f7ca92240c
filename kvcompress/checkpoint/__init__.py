"""Checkpoints: a lazy safetensors reader, an atomic directory writer, and the files of a compressed checkpoint."""
