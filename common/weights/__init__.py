"""Weights at rest and on the way: parts, what changed in them, and how they are moved. Nothing here imports torch."""
