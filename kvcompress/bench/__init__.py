"""Speed of decode attention over the packed cache, against the fastest uncompressed attention of torch."""
