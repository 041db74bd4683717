"""How large a request can be: what is larger is no request of this run."""

from pathlib import Path

from common import wire
from common.config import Config
from common.routes import route_shape
from common.shape import read_shape

_TOKEN_BYTES = 4 + 4 + 12  # id, logprob, and a version span of its own at worst
_COMPLETION_BYTES = 1 << 16  # with its grade, whose text is cut
_REST_BYTES = 1 << 24  # names and the reference answer; every other request


def max_request_bytes(config: Config) -> int:
    """Of a ledger or a verifier: that of a scored group whose completions are all as long as they may be.

    Raises:
        ModelError: Routed experts are carried, and the model's directory cannot be read.
    """
    num_completions = max(config.group_size, config.evaluation.num_samples)
    num_tokens = max(config.sampling.max_tokens, config.evaluation.sampling.max_tokens)
    size = _TOKEN_BYTES * num_tokens + _COMPLETION_BYTES
    if config.learner.routing_replay:
        shape = route_shape(read_shape(Path(config.model)))
        size += shape.size_bytes * (config.data.max_prompt_tokens + num_tokens)
    return min(wire.MAX_MESSAGE_BYTES, _REST_BYTES + num_completions * size)
