"""Running a compressed cache in transformers: cache, attention, and attaching them to a model."""
