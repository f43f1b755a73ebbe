"""The training process that `modelops train` launches. Nothing imports it."""
