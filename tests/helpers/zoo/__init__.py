"""Tiny pipelines with random weights of the families people use, for the table of pipelines."""
