"""Parts of `modelops.evaluation.compare`."""
