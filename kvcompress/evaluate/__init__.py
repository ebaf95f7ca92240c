"""Evaluation of a compressed cache, decode-faithful."""
