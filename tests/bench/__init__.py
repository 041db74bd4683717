"""Measured figures. A benchmark prints what it measured and never passes or fails."""
