"""Pipelines, and what compiles, runs and submits them."""
