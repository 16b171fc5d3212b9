"""Several ranks, one engine: the first plans, the others do the same with their share."""
