"""What all policies of these tests share."""

import pytest

from common.learning import ParallelConfig
from learner.megatron import parallel


@pytest.fixture(autouse=True, scope="package")
def process_group() -> None:
    """The group of a single rank, which is global to the process and outlives whichever test comes first."""
    parallel.initialize(ParallelConfig(), seed=0)
