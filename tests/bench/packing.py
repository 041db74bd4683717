"""Packing a large step: time, fill, and how evenly the ranks are loaded."""

import time

import numpy as np

from learner.packing import ATTENTION_CROSSOVER, plan, sequence_costs
from tests.bench.report import Figure

NUM_SEQUENCES, MAX_TOKENS, NUM_RANKS = 8192, 20_480, 8
SHORTEST, LONGEST = 200, 8192
REPEATS = 7


def run() -> list[Figure]:
    """One plan of log-normal lengths, timed several times."""
    drawn = np.random.default_rng(0).lognormal(7.45, 0.75, NUM_SEQUENCES)
    lengths = np.clip(drawn, SHORTEST, LONGEST).astype(np.int64)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        ranks = plan(lengths, MAX_TOKENS, NUM_RANKS)
        seconds.append(time.perf_counter() - began)
    costs = sequence_costs(lengths, ATTENTION_CROSSOVER)
    totals = np.array([[costs[members].sum() for members in rank] for rank in ranks])
    bound = -(-int(lengths.sum()) // MAX_TOKENS)
    num_bins = sum(map(len, ranks))
    return [
        Figure(
            f"{NUM_SEQUENCES:,} sequences into {MAX_TOKENS:,}-token micro-batches over {NUM_RANKS} ranks",
            1000 * float(np.median(seconds)),
            "ms",
            "AReaL 200 ms, prime-rl 18,000 ms; verl 18 ms (balances only)",
        ),
        Figure(
            "micro-batches, a multiple of the ranks", num_bins, "", f"lower bound {bound}; AReaL 900, lower bound 899"
        ),
        Figure("fill, of the lower bound's", bound / num_bins, ""),
        Figure("costliest rank, of the mean", float(totals.sum(1).max() / totals.sum(1).mean()), "x"),
        Figure("the same, ranks in step at each micro-batch", float(totals.max(0).sum() / totals.mean(0).sum()), "x"),
    ]
