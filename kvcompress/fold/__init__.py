"""Fewer heads in ordinary weights: which heads share virtual heads, and the projections that make them."""
