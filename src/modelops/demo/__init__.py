"""The whole chain on OpenMoji: images to a gated, served release."""
