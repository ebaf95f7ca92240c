"""Running a compressed cache in transformers: codec, cache, attention, and attaching them to a model."""
