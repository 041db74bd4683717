"""The sections of a configuration that say how the learner learns (common/sections.py has the others)."""

from typing import Annotated, Literal

from msgspec import Meta

from common.sections import Count, Dtype, Natural, NonNegative, Positive, Section, Share


class LossConfig(Section):
    """GSPO with two ratios (docs/algorithm.md).

    Attributes:
        proximal: What the trust-region ratio is measured against: the learner's weights at the start of the step
            (`recompute`), a mixture of generator and learner (`interpolate`), or the generator (`generator`).
        clip_low: Trust-region clip below 1.
        clip_high: Trust-region clip above 1.
        staleness_clip: delta of the one-sided staleness clip; a large number such as 1e9 switches it off.
        weight_cap: c: the staleness ratio is truncated to [1/c, c].
        narrowing: k of h(d) = max(narrowing_floor, 1 / (1 + k d)), which narrows the clip of stale completions.
        narrowing_floor: Lower bound of h.
        advantage: A reward less the mean of its group, in units of the group's standard deviation (`std`) or as it is
            (`mean`), or less the mean of the others (`leave_one_out`).
        overlong_buffer: Over the last so many tokens of `sampling.max_tokens` the reward falls linearly; 0 is never.
        overlong_factor: By how much it falls in all.
        truncated: Completions cut by the length limit are wrong and trained, or masked.
        filter_uniform: Whether groups whose correctness rewards are all equal are filtered out.
        kl_coefficient: Of the divergence from `model`, the frozen reference; 0 loads none.
        shuffle_rewards: A control experiment: each group's rewards are permuted, so that nothing can be learned.
    """

    proximal: Literal["recompute", "interpolate", "generator"] = "recompute"
    clip_low: Positive = 3e-4
    clip_high: Positive = 4e-4
    staleness_clip: NonNegative = 0.1
    weight_cap: Annotated[float, Meta(ge=1)] = 2.0
    narrowing: NonNegative = 0.0
    narrowing_floor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    advantage: Literal["std", "mean", "leave_one_out"] = "std"
    overlong_buffer: Natural = 0
    overlong_factor: Positive = 1.0
    truncated: Literal["train", "mask"] = "train"
    filter_uniform: bool = True
    kl_coefficient: NonNegative = 0.0
    shuffle_rewards: bool = False


class OptimizerConfig(Section):
    """AdamW.

    Attributes:
        lr: Learning rate after warm-up.
        schedule: After warm-up: constant, or falling over the rest of the run on a line or half a cosine.
        warmup_steps: Steps of linear warm-up.
        warmup_share: The same as a share of the run's steps, in place of `warmup_steps`.
        final_lr_share: What share of `lr` a falling schedule ends at.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        clip_norm: Largest global gradient norm.
        max_skipped_steps: The run stops after so many steps in a row in which a gradient was no finite number, were it
            that of one update among many, or which had no completion to train on.
    """

    lr: Positive = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Natural = 0
    warmup_share: Share = 0.0
    final_lr_share: Share = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: Positive = 1.0
    max_skipped_steps: Count = 5


class ParallelConfig(Section):
    """How the learner's ranks share the model and the batch.

    Attributes:
        data: Replicas of the model; each trains on a share of the sequences, and has a share of the optimizer's state.
        tensor: Ranks that share each matrix.
        sequence: Whether the ranks that share matrices share the tokens of norms and residuals, too.
        pipeline: Stages of layers.
        virtual_pipeline: Pieces of layers that each stage has, in turns.
        context: Ranks that share each sequence.
        expert: Ranks that share the experts of a layer; they are taken from all ranks of a pipeline stage.
        expert_tensor: Ranks that share each expert's matrices; with `expert` they are ranks of a pipeline stage.
    """

    data: Count = 1
    tensor: Count = 1
    sequence: bool = False
    pipeline: Count = 1
    virtual_pipeline: Count = 1
    context: Count = 1
    expert: Count = 1
    expert_tensor: Count = 1

    @property
    def num_ranks(self) -> int:
        """Processes of the learner."""
        return self.pipeline * self.num_stage_ranks

    @property
    def num_stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.data * self.tensor * self.context


class LearnerConfig(Section):
    """The learner.

    Attributes:
        dtype: Of the parameters.
        max_tokens_per_microbatch: Packed tokens of one forward pass, in updates and in passes for logprobs alike; a
            longer sequence is left out and counted.
        recompute: What the backward pass computes anew in place of keeping it: nothing (`none`), the feed-forward
            part or experts (`selective`), or all but each layer's input (`full`).
        offload_optimizer: Whether AdamW's two moments are in the host's memory; they come to the GPU for the step, one
            tensor at a time.
        checkpoint_every: Steps between checkpoints; there is one after the last step in any case.
        keep_checkpoints: How many of the newest are kept; where some are damaged a run falls back to another of these.
        keep_every: Those of every so many steps are kept as well; 0 is none.
        routing_replay: Whether each token goes to the experts that the engine sent it to; for a model that has experts.
        parallel: How ranks share the model and the batch.
    """

    dtype: Dtype = "float32"
    max_tokens_per_microbatch: Count = 8192
    recompute: Literal["none", "selective", "full"] = "none"
    offload_optimizer: bool = False
    checkpoint_every: Count = 50
    keep_checkpoints: Count = 2
    keep_every: Natural = 0
    routing_replay: bool = False
    parallel: ParallelConfig = ParallelConfig()
