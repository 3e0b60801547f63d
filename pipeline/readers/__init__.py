"""Reading input shards: one module for each format, all yielding the same entries."""
