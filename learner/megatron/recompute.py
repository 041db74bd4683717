"""What the backward pass computes anew in place of keeping it from the forward pass: memory for time."""

from typing import Any, Literal

from common.shape import ModelShape

Recompute = Literal["none", "selective", "full"]


def recompute_options(choice: Recompute, shape: ModelShape) -> dict[str, Any]:
    """Megatron's options of `learner.recompute`.

    Whole layers are taken one by one, so that what is kept is the input of each. The selective choice leaves out
    attention, whose cost is quadratic in the length, and takes what holds most of the activations: the feed-forward
    part or experts. Norms stay: Megatron-core 0.16.1 computes them anew only with TransformerEngine.
    """
    if choice == "none":
        return {}
    if choice == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["moe" if shape.is_moe else "mlp"]}
