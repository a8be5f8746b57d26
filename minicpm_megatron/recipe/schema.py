"""What a run is, as one frozen and validated value.

A `Recipe` holds everything that decides a run and nothing that a run finds out. Types are strict: a quoted
number, a fraction where a count is meant or an unknown key is refused here, long before a process group exists.
Rules that join several fields are in `checks`; merging of presets, files and overrides is in `load`.
Defaults that come from the paper (arXiv 2404.06395) carry their place in it; where the paper is silent the
description says "common practice, not published".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from minicpm_megatron.recipe import checks, rope_checks

MOST = 2**31 - 1  # of what is counted; libraries keep counts in 32 or 64 bits, and products of two must fit 64
FARTHEST = 2**53  # position in a schedule, up to which every whole number is a float
HANG_TIMEOUTS = (1.0, 1e9)  # seconds, shortest and longest

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0, le=MOST)]


def _word_of(characters: str) -> AfterValidator:
    """Let words pass that begin with a letter or a digit and may hold `characters` besides."""
    pattern = re.compile(rf"[A-Za-z0-9][A-Za-z0-9{re.escape(characters)}]{{0,99}}")

    def check(word: str) -> str:
        if pattern.fullmatch(word) is None:
            others = " ".join(characters)
            raise ValueError(
                f"must begin with a letter or digit and have letters, digits and {others} alone, 100 characters at most"
            )
        return word

    return AfterValidator(check)


# the name becomes a folder under run.directory, a validation name becomes part of a metric's name
Name = Annotated[str, _word_of("._-")]
MetricName = Annotated[str, _word_of("_-")]


def _without_nul(path: str) -> str:
    if "\0" in path:
        raise ValueError("must not contain the character NUL, which no file system takes")
    return path


PathText = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Length = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=FARTHEST)]  # 20e9 is how people write tokens


def _auto_or_count(value: Any) -> Any:
    # not a union of two types: pydantic would name both alternatives in the error, and put a type into the key's name
    if value == "auto" or (type(value) is int and 0 < value <= MOST):
        return value
    raise ValueError(f"must be auto, or a whole number from 1 to {MOST:,}")


AutoOrCount = Annotated[int | Literal["auto"], PlainValidator(_auto_or_count)]


class Section(BaseModel):
    """Common ground of all parts: immutable, no unknown keys, no conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class RopeScaling(Section):
    """How the base of the rotary positions grows with the context; formulas in `methods.rope`."""

    type: Literal["none", "dynamic", "ntk", "product"] = "none"
    """dynamic: beyond max_position_embeddings the base grows with the length of the sequence, as in the released 128K
    configuration; ntk: rotary_base x factor^(d / (d - 2)) at every length; product: rotary_base x factor x d / (d - 2),
    as that model is also run. d is kv_channels."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """How many times as long the context becomes."""
    original_max_position_embeddings: Count | None = None
    """Context before scaling, for the record and checked: ntk and product reach at most factor times as far; dynamic
    begins at max_position_embeddings and takes no other value."""


class ModelRecipe(Section):
    """The shape of the model and its muP constants; `presets` holds the published ones."""

    num_layers: Count
    """Transformer layers."""
    hidden_size: Count
    """d_model."""
    ffn_hidden_size: Count
    """d_ff, the width of each of SwiGLU's two branches (2.5 d_model in every published size)."""
    num_attention_heads: Count
    """Query heads n_q."""
    num_query_groups: Count = Field(default=0)
    """Key/value heads n_kv; defaults to num_attention_heads (no grouping)."""
    kv_channels: Count = Field(default=0)
    """d_head, channels a head; defaults to hidden_size / num_attention_heads (64 in every published size)."""
    vocab_size: Annotated[int, Field(ge=2, le=MOST)]
    """Rows of the embedding before any padding; never fewer than the tokenizer's pieces."""
    max_position_embeddings: Count = 4096
    """Longest sequence in tokens the model is meant for (released configurations); with dynamic rope_scaling the
    longest one that is not scaled, and factor times as many are allowed."""
    rotary_base: Positive = 10_000.0
    """RoPE base (released configurations). Another one is the adjusted base frequency of section 7.2."""
    rope_scaling: RopeScaling = Field(default_factory=RopeScaling)
    """Scaling of the base for long contexts; null is none."""
    norm_epsilon: Positive = 1e-5
    """RMSNorm epsilon (released configurations)."""
    qk_layernorm: bool = False
    """RMSNorm of every head's queries and keys before the rotation (Megatron-Core's name). The paper tried it and did
    not adopt it; no published format but our own checkpoints holds it."""
    untie_embeddings_and_output_weights: bool = False
    """False: the LM head is the input embedding (section 6.1: tied)."""
    scale_emb: Positive = 12.0
    """Factor on the embedding output (Table 7 and appendix A.1)."""
    scale_depth: Positive = 1.4
    """Each block's output is multiplied by scale_depth / sqrt(num_layers) (Table 7 and appendix A.1)."""
    dim_model_base: Count = 256
    """d_base: widths count relative to it in muP (all released configurations)."""
    init_method_std: Positive = 0.1
    """Initial standard deviation at width dim_model_base (appendix A.1)."""
    num_moe_experts: Annotated[int, Field(ge=2, le=MOST)] | None = None
    """Experts a layer; null is a dense model."""
    moe_router_topk: Count = 2
    """Experts that serve a token (section 7.3); without effect in a dense model, as are the other moe_ keys."""
    moe_ffn_hidden_size: Count | None = None
    """Width of each branch of an expert; null is ffn_hidden_size."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Factor of the Switch Transformer's load-balancing loss (section 7.3)."""
    moe_router_load_balancing_type: Literal["seq_aux_loss", "aux_loss"] = "seq_aux_loss"
    """Over which tokens the load is balanced: those of each sequence, which makes the loss independent of the
    layout, or those of a micro-batch on one data-parallel rank (Megatron-Core's names)."""
    moe_z_loss_coeff: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Factor of the router's z-loss (ST-MoE, arXiv 2202.08906; not used in the paper)."""
    moe_router_pre_softmax: bool = False
    """False: a token's k weights are renormalised to 1 (the released model). True: they are the softmax over all
    experts, and sum to less."""
    parametrization: Literal["mup", "standard"] = "mup"
    """mup: rates, inits and logits scaled with width as in Table 7; standard: none of them."""
    embedding_role: Literal["vector", "matrix"] = "vector"
    """Whether muP takes the embedding for a vector or for one of Table 7's two-dimensional tensors. The paper leaves
    it open; vector is what keeps the logits independent of width."""

    @property
    def mlp_width(self) -> int:
        """Width of each branch of the MLP, or of an expert where there are several."""
        return (
            self.ffn_hidden_size if self.num_moe_experts is None else self.moe_ffn_hidden_size or self.ffn_hidden_size
        )

    @model_validator(mode="before")
    @classmethod
    def _fill_head_shape(cls, fields: Any) -> Any:
        # here rather than by defaults, so that a resolved recipe is explicit and the 0 of the fields never survives
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        if fields.get("rope_scaling", ...) is None:
            del fields["rope_scaling"]
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        if fields.get("num_query_groups") is None and heads is not None:
            fields["num_query_groups"] = heads
        if fields.get("kv_channels") is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            fields["kv_channels"] = hidden // heads
        return fields

    @model_validator(mode="after")
    def _check(self) -> ModelRecipe:
        checks.check_model(self)
        rope_checks.check_rope_scaling(self)
        return self

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that is accepted."""
        reach = self.rope_scaling.factor if self.rope_scaling.type == "dynamic" else None
        return int(self.max_position_embeddings * (reach or 1))


class DataSource(Section):
    """One tokenised corpus and its share of the training tokens."""

    prefix: PathText
    """PREFIX.bin and PREFIX.idx as minicpm preprocess writes them; relative to the working directory."""
    weight: Positive = 1.0
    """Share of the samples relative to the other sources' weights."""


class ShorterSamples(Section):
    """A part of the run in which samples are fed as several shorter ones."""

    until: Annotated[Length, Field(gt=0)]
    """Where it ends, in schedule.unit."""
    sequence_length: Count
    """Tokens of each of the shorter ones; divides data.sequence_length."""


class DataRecipe(Section):
    """What is read. All paths are relative to the directory the command is started in."""

    train: Annotated[tuple[DataSource, ...], Field(strict=False, min_length=1)]
    """Training corpora."""
    validation: dict[MetricName, PathText] = Field(default_factory=dict)
    """Held-out corpora: name in the logs -> prefix."""
    tokenizer: PathText | None = None
    """Tokenizer directory; checked against the data's, copied into exports, and needed for a loss per byte."""
    sequence_length: Count
    """Tokens a sample."""
    reset_attention_mask: bool = False
    """Attention ends at the borders of the documents that a sample is packed with (Megatron-LM's name)."""
    curriculum: Annotated[tuple[ShorterSamples, ...], Field(strict=False)] = ()
    """Shorter samples to begin with, in order: curriculum learning of the context (section 7.2). The tokens of every
    step, and their order, are those of the whole samples."""


class ParallelRecipe(Section):
    """How one copy of the model is spread; what remains of the world size is data parallelism."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each matrix and the vocabulary."""
    pipeline_model_parallel_size: Count = 1
    """Ranks that share the layers in order."""
    pipeline_layers: Annotated[tuple[Count, ...], Field(strict=False)] | None = None
    """Transformer layers on each pipeline stage; null: as even in parameters as can be, embedding and head counted."""
    context_parallel_size: Count = 1
    """Ranks that share each sequence."""
    cp_comm_type: Literal["p2p", "a2a"] = "p2p"
    """How context-parallel ranks attend, in Megatron-Core's names: p2p is ring attention, a2a is Ulysses."""
    expert_model_parallel_size: Count = 1
    """Ranks that share the experts; taken from the data- and context-parallel ones."""
    sequence_parallel: bool = False
    """Split the activations between the tensor-parallel regions along the sequence."""


class BatchGrowth(Section):
    """One enlargement of the batch in mid-run (section 6.2: 1.2B goes from 2M to 4M tokens)."""

    after_tokens: Annotated[Length, Field(gt=0)]
    """Tokens consumed before the first step of the new size."""
    global_batch_size: Count
    """New size in samples."""


class TrainingRecipe(Section):
    """The steps themselves."""

    global_batch_size: Count
    """Samples a step over all ranks."""
    micro_batch_size: AutoOrCount
    """Samples a forward pass on one rank. auto: as many as divide every batch size over the data-parallel ranks, at
    most max_micro_batch_size."""
    max_micro_batch_size: Count = 8
    """The most samples that auto puts into a forward pass, for the memory of one rank."""
    batch_growth: Annotated[tuple[BatchGrowth, ...], Field(strict=False)] = ()
    """Later batch sizes, in order."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of forward and backward; the optimizer always keeps fp32 weights."""
    gradient_clipping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Largest global gradient norm, 0 for none (common practice, not published)."""
    z_loss_coeff: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Factor of the squared log of the softmax's normaliser, which is added to the training loss and to its log, but to
    no validation loss (PaLM, arXiv 2204.02311, section 5, takes 1e-4; not used in the paper)."""
    objective: str = "mean-token-loss"
    """What a step minimises: mean-token-loss, or one that another package registered. The validation loss is always
    the cross-entropy."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Decides initial weights and sample order."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward: none, the attention core, or whole layers."""
    fused_loss: bool = True
    """LM head and loss in one, chunk by chunk; false: whole logits first, the reference to compare with."""
    attention_kernel: str = "auto"
    """What attends on one rank. auto: flash-attn where it is installed and fits, else torch's SDPA; sdpa: the latter
    always; reference: all scores at once, to compare with; or one that another package registered. With context
    parallelism auto alone."""
    deterministic: bool = False
    """On CUDA: kernels that give the same bits in every run, so that a resumed run equals one that was never stopped;
    slower. On CPU runs are so anyway."""
    stop_after: Count | None = None
    """End after this many steps, the schedule unchanged."""
    hang_timeout: Annotated[float, Field(ge=HANG_TIMEOUTS[0], le=HANG_TIMEOUTS[1])] = 600.0
    """Seconds without progress after which the run ends and names the ranks that the others wait for."""


class OptimizerOptions(Section):
    """Base of the keys that one optimizer has for itself: fields as in any section, described by a text below each."""


class OptimizerRecipe(Section):
    """The optimizer. The learning rates of the muP groups are multiples of `lr`."""

    name: str = "adamw"
    """adamw, muon (hidden matrices by Muon, all else by AdamW), or one that another package registered."""
    lr: Positive = 0.01
    """Base learning rate (section 3.3, appendix A.1: best on every size tried)."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """Adam's decay rates (common practice, not published)."""
    eps: Positive = 1e-8
    """Adam's epsilon (common practice, not published)."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Decoupled weight decay of the hidden matrices (common practice, not published)."""
    weight_decay_mode: Literal["tied", "independent"] = "tied"
    """tied: a step shrinks weights by rate x weight_decay (AdamW); independent: by weight_decay times the
    schedule's factor, whatever the rate (tried in appendix A.1 and not adopted)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keys that only the optimizer named by name has."""


SHARED_SCHEDULE_KEYS = frozenset({"decay", "decay_shape", "half_life", "period", "min_lr_ratio"})
"""Keys of the schedule section that some schedules use and others do not; each says which (`methods.schedule`)."""


class ScheduleOptions(Section):
    """Base of the keys that one schedule has for itself: fields as in any section, described by a text below each.

    Attributes:
        lengths: names of the fields that are positions or lengths in schedule.unit; the wind tunnel stretches them
            with the run.
    """

    lengths: ClassVar[frozenset[str]] = frozenset()


class ScheduleRecipe(Section):
    """The learning rate over the run as a multiple of `optimizer.lr`; formulas in `methods.schedules`."""

    shape: str = "wsd"
    """wsd (section 4), cosine, cosine_loop (appendix B.1), constant, another one of docs/schedules.md, or one that
    another package registered."""
    unit: Literal["steps", "tokens"] = "steps"
    """What warmup, total, decay, half_life and period count. In tokens the curve does not move when the batch
    grows."""
    warmup: Length = 0
    """Length of the linear rise (not published)."""
    total: Annotated[Length, Field(gt=0)]
    """Length of the whole run, warmup and decay included."""
    decay: Length | None = None
    """WSD and its like: length of the final decay, 0 for a trunk that only ever branches. About 10 % of the run is
    enough, 2.5 % is not (section 4.3)."""
    decay_shape: str = "exponential"
    """WSD and its like: exponential, linear, cosine, 1-sqrt, megatron-exponential or one that another package
    registered."""
    half_life: Positive | None = None
    """Exponential decay: the rate halves once each this long (section 6.2: 5,000 steps, which is 20B tokens)."""
    min_lr_ratio: Fraction | None = None
    """Floor relative to `optimizer.lr`; null is the shape's own: none for exponential, otherwise 0.1 (appendix B.1
    for cosine, the authors' posted code for linear)."""
    period: Annotated[Length, Field(gt=0)] | None = None
    """Cosine and CosineLoop: T of appendix B.1, the position of the first minimum; null is `total`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keys that only the schedule named by shape has."""


class DeepSpeedRecipe(Section):
    """What DeepSpeed is told beyond the rest of the recipe."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """0 none, 1 optimizer state, 2 and gradients, 3 and weights divided over the data-parallel ranks."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: master weights and Adam's moments stay in host memory and are stepped there (ZeRO-Offload, arXiv
    2101.06840); needs zero_stage 1 or more."""
    offload_param: Literal["none", "cpu"] = "none"
    """cpu: weights stay in host memory until they are gathered (ZeRO-Infinity, arXiv 2104.07857); needs zero_stage 3
    and offload_optimizer."""
    config: PathText | None = None
    """A DeepSpeed JSON laid over ours; contradictions with the recipe are refused."""


class EvaluationRecipe(Section):
    """Loss on `data.validation`."""

    interval: Count | None = None
    """Steps between evaluations; null for none."""
    batches: Count | None = 8
    """Global batches read from each validation set; null, or a set that has less: all of it."""


class CheckpointRecipe(Section):
    """What survives."""

    interval: Count | None = None
    """Steps between saves; null saves at the end only."""
    keep_last: Count = 2
    """Newest checkpoints kept."""
    keep_every: Count | None = None
    """Checkpoints whose step is a multiple of this are kept for ever."""
    steps: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """Steps after which there is a save besides, kept for ever: where decays are to branch off."""
    async_save: bool = True
    """Copy the state to host memory and write it while training goes on. The last save, and one after a signal or a
    fault, are always waited for."""
    on_corrupt: Literal["stop", "previous"] = "stop"
    """When the newest checkpoint fails verification: stop, or resume from the one before."""


class FaultsRecipe(Section):
    """What is done about a step whose numbers are wrong: stop before the update, skip the update, or go back."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is not finite. skip: the batch is consumed without an update. rollback: go on from the
    newest checkpoint with the data after the batch."""
    spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """When the loss or the gradient norm spikes; judged before the update."""
    spike_sigmas: Positive = 6.0
    """A spike lies more than this many standard deviations above the mean of the last steps (OLMo-core's
    SkipStepOptimizer)."""
    spike_window: Annotated[int, Field(ge=4, le=MOST)] = 128
    """Steps, skipped ones left out, that the mean is taken over; without half of them there is no judgement
    (OLMo-core's SkipStepOptimizer)."""
    rollback_skip: Annotated[int, Field(ge=0, le=MOST)] = 100
    """Global batches that a rollback passes over after the faulty one, besides those since the checkpoint (PaLM, arXiv
    2204.02311, section 5.1: went back about 100 steps and passed over 200 to 500 batches)."""
    max_consecutive: Count = 3
    """Steps skipped in a row, or rollbacks to one checkpoint; one more ends the run."""


class GradientStatisticsRecipe(Section):
    """Statistics of consecutive gradients (section 4.4 of the paper)."""

    interval: Count | None = None
    """Steps between measurements; null for none. Each costs a pass over gradients and weights, and from a measured step
    to the one after it a copy of both."""
    first_step: Count = 1
    """The first step that may be measured."""
    last_step: Count | None = None
    """The last step that may be measured; null is the end of the run."""


class LoggingRecipe(Section):
    """What is seen."""

    interval: Count = 10
    """Steps between lines."""
    tensorboard: bool = True
    """Write TensorBoard's event files into the run's folder."""
    gradient_statistics: GradientStatisticsRecipe = Field(default_factory=GradientStatisticsRecipe)
    """Which steps are measured."""
    observers: Annotated[tuple[str, ...], Field(strict=False)] = (
        "metrics-jsonl",
        "tensorboard",
        "console",
        "expert-loads",
        "gradient-statistics",
    )
    """What follows the run, called in this order; also wandb, mlflow, hf-copy (a Hugging Face copy at every save), or
    one that another package registered. One that fails is left out with a line; metrics-jsonl alone ends the run."""


class RunRecipe(Section):
    """Where things go."""

    directory: PathText = "runs"
    """A run writes below directory/name; relative to the working directory."""


class Recipe(Section):
    """Everything that decides a run.

    Raises:
        pydantic.ValidationError: a field is missing, unknown, of another type or out of its range.
        UserError: the fields contradict each other.
    `load.load_recipe` and `load.build` turn the first into the second as well."""

    name: Name
    """Folder of the run below run.directory."""
    preset: str | None = None
    """Where `model` came from; for the reader, the resolved values are in `model`."""
    model: ModelRecipe
    data: DataRecipe
    parallel: ParallelRecipe = Field(default_factory=ParallelRecipe)
    training: TrainingRecipe
    optimizer: OptimizerRecipe = Field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe
    deepspeed: DeepSpeedRecipe = Field(default_factory=DeepSpeedRecipe)
    evaluation: EvaluationRecipe = Field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = Field(default_factory=CheckpointRecipe)
    faults: FaultsRecipe = Field(default_factory=FaultsRecipe)
    logging: LoggingRecipe = Field(default_factory=LoggingRecipe)
    run: RunRecipe = Field(default_factory=RunRecipe)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        checks.check_recipe(self)
        return self

    @property
    def run_directory(self) -> Path:
        """Folder of everything this run writes."""
        return Path(self.run.directory) / self.name

    def check_world_size(self, world_size: int) -> checks.Layout:
        """The layout on `world_size` ranks; see `checks.layout`."""
        return checks.layout(self, world_size)
