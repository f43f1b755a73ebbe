"""The whole chain on OpenMoji: pictures to a gated, served release."""
