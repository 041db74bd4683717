"""What is wrong with the routed experts of a group: they are there where the run replays them, and nowhere else."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from common import wire
from common.config import Config
from common.routes import RouteShape, route_shape, routes_reason
from common.shape import read_shape

RoutesCheck = Callable[[int, wire.Group], str]


def routes_check(config: Config, num_prompt_tokens: Callable[[int], int]) -> RoutesCheck:
    """Why the routes of a training group, by its prompt's row, cannot be what was leased; empty where they can."""
    if not config.learner.routing_replay:
        return lambda _, group: unexpected_routes(group)

    @cache
    def shape() -> RouteShape:  # an audit checks no group, and may outlive the model's directory
        return route_shape(read_shape(Path(config.model)))

    def check(prompt: int, group: wire.Group) -> str:
        num_tokens = num_prompt_tokens(prompt)
        reasons = (routes_reason(c.routed_experts, num_tokens + c.num_tokens, shape()) for c in group.completions)
        return next((reason for reason in reasons if reason), "")

    return check


def unexpected_routes(group: wire.Group) -> str:
    """What to say of a group that carries routes and was not asked to; empty where it carries none."""
    num_routes = sum(len(completion.routed_experts) for completion in group.completions)
    return f"found {num_routes} routed experts, expected none: the lease did not ask for them" if num_routes else ""
