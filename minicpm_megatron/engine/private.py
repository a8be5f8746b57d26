"""Names inside DeepSpeed and Megatron-Core that `engine` relies on and that neither promises to keep.

tests/engine/test_private.py holds every row against the installed versions, and the sources of `engine` against the
rows, so that an upgrade fails there first. Most rows are for what DeepSpeed has no public function for; the others are
work-arounds, whose symptom and end stand in `without` and `delete`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Private:
    """Names of one place.

    Attributes:
        place: module, or module:class.
        names: attributes of it; of a class also those that its methods set on `self`, of a module also those of the
            parameters and tensors that its functions are given.
        used: where in `engine`, and for what.
        without: the symptom where it is not used.
        delete: what makes it superfluous, and what to delete then.
        version: the last one in which the symptom was seen.
    """

    place: str
    names: tuple[str, ...]
    used: str
    without: str
    delete: str
    version: str = "deepspeed 0.19.8"


ENGINE = "deepspeed.runtime.engine"
PIPE = "deepspeed.runtime.pipe.engine:PipelineEngine"
STAGES_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"
GROUPS = "deepspeed.utils.groups"
NO_STATE = "checkpoints would hold DeepSpeed's flat buffers, and load on the layout that wrote them alone"
PUBLIC_STATE = "DeepSpeed hands out masters and moments with their places in a parameter, at every stage: `pieces`"
NO_NORM = "a loss is known to be bad only after the update; DeepSpeed measures gradients inside `step`"
PUBLIC_NORM = "DeepSpeed measures gradients, and drops them, without a step: `gradient_norm` and `discard`"

PRIVATE = (
    # while DeepSpeed starts
    Private(
        "deepspeed.ops",
        ("__compatible_ops__",),
        "patches.prepare: says that the shared-memory all-reduce cannot be built",
        "on CPU every new environment compiles it for half a minute for inference alone, and a build that is killed"
        " leaves a lock on which all later runs wait for ever",
        "DeepSpeed builds it when inference asks for it: the line in patches.prepare",
    ),
    Private(
        "deepspeed.runtime.bf16_optimizer",
        ("see_memory_usage",),
        "patches.prepare: says nothing",
        "16 lines on memory at each start in bf16 at ZeRO 1, whatever the log level (force=True)",
        "force=True is gone: the line in patches.prepare and _say_nothing",
    ),
    Private(
        ENGINE,
        ("DeepSpeedZeroOptimizer", "FP16_UnfusedOptimizer"),
        "zero.stand_in: bound to our subclasses while DeepSpeed starts",
        "DeepSpeed builds its own classes, and takes no others",
        "deepspeed.initialize takes a class or a factory of optimizers: zero.stand_in",
    ),
    # ZeRO 0
    Private(
        UNFUSED,
        ("initialize_optimizer_states",),
        "zero.stage0: allocates nothing",
        "a step with zero gradients at the start decays the masters and is counted: Adam's first update is a quarter"
        " too small",
        "it takes no step: the override",
    ),
    Private(
        UNFUSED,
        ("unscale_and_clip_grads",),
        "zero.stage0: clips by the norm over all ranks",
        "under tensor parallelism it clips by the norm of rank 0's shards",
        "its step counts shards by `tensor_model_parallel`: the override",
    ),
    Private(UNFUSED, ("fp16_groups", "fp32_groups"), "zero.stage0: master of each parameter", NO_STATE, PUBLIC_STATE),
    # ZeRO 1 and 2
    Private(
        "deepspeed.runtime.zero.stage_1_and_2",
        ("all_gather_dp_groups",),
        "zero.flat_gradients.prepare: broadcasts in place on CPU",
        "gloo's all-gather writes all weights into new memory in every step and copies them from there",
        "gloo gathers in place: broadcast_partitions and prepare",
    ),
    Private(
        "deepspeed.runtime.bf16_optimizer",
        ("all_gather_dp_groups",),
        "as in stage_1_and_2",
        "as in stage_1_and_2",
        "as in stage_1_and_2",
    ),
    Private(
        STAGES_1_AND_2,
        (
            "process_gradients",
            "reduce_gradients",
            "bit16_groups",
            "bit16_groups_flat",
            "round_robin_bit16_groups",
            "round_robin_bit16_offsets",
            "partition_size",
            "real_dp_process_group",
            "reduce_bucket_size",
            "communication_data_type",
            "sequence_parallel_size",
            "averaged_gradients",
            "gradient_reduction_w_predivide",
            "_build_compact_grad_partition_buffer",
            "_clear_param_grad_only",
            "_epilogue_ran_this_backward",
        ),
        "zero.flat_gradients: gradients in buffers that stay",
        "ZeRO 1 in fp32 on CPU takes memory of four times the gradients from the kernel in every step: up to 28 %"
        " slower than torch's DistributedDataParallel",
        "DeepSpeed keeps its buffers: zero.flat_gradients but for prepare, and FlatStage1",
    ),
    Private(
        "deepspeed.runtime.zero.stage_1_and_2:GradPartitionBufferGroup",
        ("flat_partition", "move_flat_partition"),
        "zero.flat_gradients",
        "as of DeepSpeedZeroOptimizer's",
        "as of DeepSpeedZeroOptimizer's",
    ),
    Private(
        STAGES_1_AND_2,
        (
            "scaled_global_norm",
            "cpu_offload",
            "params_in_partition",
            "complete_grad_norm_calculation_for_cpu_offload",
            "get_grad_norm_direct",
        ),
        "zero.one_norm: one norm over all groups of a pipeline stage",
        "stages without an embedding leave the others waiting in an all-reduce for ever",
        "it sums over groups before it reduces: zero.one_norm",
    ),
    Private(
        "deepspeed.runtime.zero.stage_1_and_2",
        ("_zero_padding",),
        "zero.one_norm: a part of flat gradients that belongs to no parameter",
        "gradients and parameters of a partition do not match one to one",
        "as of scaled_global_norm's",
    ),
    Private(
        STAGES_1_AND_2,
        ("norm_for_param_grads", "averaged_gradients"),
        "zero.stages_1_and_2: a step that is discarded leaves no trace",
        "a skipped step's offloaded gradients are added to those of the next",
        "step() clears them when it skips: OffloadedStages1And2._forget_skipped; the rest stays",
    ),
    Private(
        STAGES_1_AND_2,
        ("scaled_global_norm",),
        "zero.stages_1_and_2: gradient norm before the update",
        NO_NORM,
        PUBLIC_NORM,
    ),
    Private(
        BF16, ("get_grads_for_norm", "mpu"), "zero.stage1_bf16: gradient norm before the update", NO_NORM, PUBLIC_NORM
    ),
    Private(BF16, ("fp32_groups_gradients_flat",), "zero.stage1_bf16: a step that is discarded", NO_NORM, PUBLIC_NORM),
    Private(
        "deepspeed.utils.mixed_precision_linkage",
        ("_hp_mapping", "_index_in_param_group"),
        "zero.flat_partitions: a parameter's masters, moments and gradient in the flat buffers",
        NO_STATE,
        PUBLIC_STATE,
    ),
    Private(
        "deepspeed.utils.tensor_fragment:tensor_fragment",
        (
            "param_group_index",
            "lp_fragment_address",
            "hp_fragment",
            "hp_fragment_address",
            "get_lp_grad_fragment",
        ),
        "zero.flat_partitions",
        NO_STATE,
        PUBLIC_STATE,
    ),
    # ZeRO 3
    Private(
        STAGE_3,
        ("grad_position", "get_param_id", "fp32_partitioned_groups_flat"),
        "zero.stage3: a parameter's masters and moments in the flat buffers",
        NO_STATE,
        PUBLIC_STATE,
    ),
    Private(STAGE_3, ("_get_norm_groups",), "zero.stage3: gradient norm before the update", NO_NORM, PUBLIC_NORM),
    Private(
        STAGE_3,
        ("grad_partitions_flat_buffer", "norm_for_param_grads"),
        "zero.stage3: a step that is discarded",
        NO_NORM,
        PUBLIC_NORM,
    ),
    Private(
        "deepspeed.runtime.zero.partition_parameters",
        ("ds_tensor", "ds_numel", "ds_shape", "ds_secondary_tensor"),
        "zero.stage3: this rank's part of a weight",
        NO_STATE,
        PUBLIC_STATE,
    ),
    # the engine
    Private(
        ENGINE + ":DeepSpeedEngine",
        ("micro_steps", "skipped_steps"),
        "engine.accumulate: steps end where ours do; zero.partitioned: whether an update was skipped",
        "after a batch that grew, or a discarded step, DeepSpeed ends a step in the middle of ours",
        "managed_gradient_accumulation: false works at every stage: the line in engine.accumulate",
    ),
    # pipelines
    Private(
        PIPE,
        (
            "_exec_schedule",
            "_train_schedule",
            "_exec_optimizer_step",
            "_aggregate_total_loss",
            "_compute_loss",
            "total_loss",
            "total_additional_losses",
        ),
        "pipeline.PipelinedEngine: the 1F1B schedule without its update",
        "train_batch updates before anyone sees that a loss or a gradient is not finite",
        "train_batch can leave the update to the caller: PipelinedEngine.accumulate and _update, _WithoutUpdate",
    ),
    Private(
        PIPE,
        ("_INSTRUCTION_MAP", "_exec_forward_pass", "pipe_buffers"),
        "pipeline._forward_with_labels: the head makes the losses inside forward",
        "in bf16 DeepSpeed clears gradients when backward reaches what forward gave: a head behind that gets none",
        "gradients are cleared before backward alone: _forward_with_labels, and Labels of model.pipeline",
    ),
    Private(
        "deepspeed.runtime.pipe.module:PipelineModule",
        ("_partition_layers", "_set_bounds", "parts", "stage_id"),
        "pipeline.MiniCPMPipeline: cut where the recipe says",
        "every stage builds the layers of all others to count their parameters",
        "PipelineModule takes the bounds: _partition_layers",
    ),
    Private(
        "deepspeed.runtime.pipe.module",
        ("ds_pipe_replicated",),
        "zero.adapter.is_tied_copy",
        "a tied embedding is measured and saved twice",
        "DeepSpeed says which stage a tied parameter counts on: is_tied_copy",
    ),
    # experts
    Private(
        "deepspeed.moe.utils",
        ("allreduce", "group_name"),
        "experts.is_divided and mark: a parameter is an expert's, of those ranks",
        "experts' gradients are averaged over ranks that hold other experts",
        "DeepSpeed is told a parameter's ranks: mark",
    ),
    Private(
        GROUPS,
        (
            "_EXPERT_PARALLEL_GROUP",
            "_EXPERT_DATA_PARALLEL_GROUP",
            "expert_tensor_parallel_world_size",
            "_get_max_expert_size_name",
        ),
        "experts.mark: Megatron-Core's groups of experts",
        "DeepSpeed makes groups of its own for its own experts only, and reads their sizes out of names",
        "DeepSpeed takes groups: mark and shown_to_deepspeed",
    ),
    Private(
        "deepspeed.moe.layer:MoE",
        ("set_deepspeed_parallelism", "num_experts"),
        "experts._ExpertsAreHere: a model of Megatron-Core's experts counts as one with experts",
        "experts' gradients are averaged over ranks that hold other experts",
        "has_moe_layers is a setting: _ExpertsAreHere",
    ),
)


def private_names() -> frozenset[str]:
    """Return every name of the table."""
    return frozenset(name for row in PRIVATE for name in row.names)
