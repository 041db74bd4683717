"""Packing 8,192 sequences into micro-batches over 8 ranks."""

import math
import time

import numpy as np

from learner.packing import pack_sequences, sequence_costs
from tests.bench.report import Figure

NUM_SEQUENCES, SHORTEST, LONGEST = 8192, 200, 8192
MAX_TOKENS, NUM_RANKS, REPEATS = 20_480, 8, 5
PEERS = "AReaL 0.20 s, prime-rl 18 s; verl 0.018 s (balances only)"


def run() -> list[Figure]:
    """Measures time, fill and balance."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(math.log(1800), 0.8, NUM_SEQUENCES), SHORTEST, LONGEST).astype(np.int64)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        ranks = pack_sequences(lengths, MAX_TOKENS, NUM_RANKS)
        seconds.append(time.perf_counter() - began)
    num_bins = sum(map(len, ranks))
    bound = math.ceil(lengths.sum() / MAX_TOKENS)
    costs = sequence_costs(lengths)
    loads = np.array([sum(costs[members].sum() for members in bins) for bins in ranks])
    return [
        Figure("packing, median of 5", float(np.median(seconds)), "s", PEERS),
        Figure("micro-batches", num_bins, "", f"lower bound {bound}; AReaL 900 where the bound is 899"),
        Figure("fill, of the lower bound's", bound / num_bins, ""),
        Figure("largest rank's cost over the mean", float(loads.max() / loads.mean()), ""),
    ]
