"""The names of the rewards; the verifier defines what they mean."""

REWARDS = ("exact", "math")
DEFAULT_REWARD = "math"
