"""Pipeline parallelism: the layers of `model.pipeline` in DeepSpeed's PipelineModule, stepped by our engine.

DeepSpeed's 1F1B schedule runs everything but the update, so that a loss or a gradient that is not finite is met before
it. Written for deepspeed 0.19: the schedule, `_exec_schedule` and `_exec_optimizer_step` are not public names.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced

from minicpm_megatron.engine import patches
from minicpm_megatron.engine.engine import Engine, MicroBatch
from minicpm_megatron.engine.objective import Objective, mean_token_loss
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.loss import token_losses
from minicpm_megatron.model.pipeline import (
    Labels,
    PipelineEmbedding,
    PipelineFinalNorm,
    PipelineHead,
    PipelineLayer,
)
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import ModelRecipe, Recipe
from minicpm_megatron.recipe.parameters import attention_parameters, mlp_parameters

TIED = "embedding"


def stage_bounds(config: MiniCPMConfig, model: ModelRecipe, layers: tuple[int, ...] | None) -> list[int]:
    """Where the list of embedding, layers, final norm and head is cut: stages + 1 positions.

    Args:
        model: what `config` was made of.
        layers: transformer layers on each stage; None: as even in parameters as can be.
    """
    stages = config.pipeline_model_parallel_size
    if layers is None:
        hidden = config.hidden_size
        layer, experts = attention_parameters(model), model.num_moe_experts
        layer += mlp_parameters(model) if experts is None else experts * (mlp_parameters(model) + hidden)
        vocabulary = config.padded_vocab_size() * hidden
        weights = [vocabulary, *[layer] * config.num_layers, hidden, vocabulary]
        return [int(position) for position in partition_balanced(weights, stages)]
    bounds = [0]
    for count in layers:
        bounds.append(bounds[-1] + count)
    # the embedding goes with the first stage, norm and head with the last
    return [0, *(bound + 1 for bound in bounds[1:-1]), config.num_layers + 3]


class MiniCPMPipeline(PipelineModule):
    """A PipelineModule that is told where to cut, so that no stage builds the others' layers to count them."""

    def __init__(self, config: MiniCPMConfig, bounds: list[int], labels: Labels, **keywords: Any) -> None:
        self.config, self.bounds, self.labels = config, bounds, labels
        self.objective: Objective = mean_token_loss
        self.counted_rows: int | None = None
        """None: the loss is `objective`. Otherwise: the sum over the tokens of so many rows of a micro-batch."""
        super().__init__(loss_fn=self._loss, **keywords)

    def _loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = self.losses(outputs, labels)
        return self.objective(losses, {}) if self.counted_rows is None else losses[: self.counted_rows].sum()

    def losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of the last stage's outputs: fp32 [b, s] in nats."""
        if self.config.fused_loss:
            return outputs
        return token_losses(self.config, outputs, labels, training=self.training)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


def build_pipeline(config: MiniCPMConfig, recipe: Recipe) -> MiniCPMPipeline:
    """This rank's stage of the model."""
    untied, labels = config.untie_embeddings_and_output_weights, Labels()
    layers = [
        LayerSpec(PipelineEmbedding, config)
        if untied
        else TiedLayerSpec(TIED, PipelineEmbedding, config, tied_weight_attr="embedding.word_embeddings.weight"),
        *(LayerSpec(PipelineLayer, config, number) for number in range(1, config.num_layers + 1)),
        LayerSpec(PipelineFinalNorm, config),
        LayerSpec(PipelineHead, config, labels)
        if untied
        else TiedLayerSpec(
            TIED,
            PipelineEmbedding,
            config,
            forward_fn=lambda module, hidden_states: module.head(hidden_states, labels.now),
            tied_weight_attr="embedding.word_embeddings.weight",
        ),
    ]
    stages, tensor = config.pipeline_model_parallel_size, config.tensor_model_parallel_size
    # Megatron-Core's order of ranks: tensor fastest, then data, then pipeline
    topology = PipeModelDataParallelTopology(
        num_pp=stages, num_mp=tensor, num_dp=dist.get_world_size() // (stages * tensor)
    )
    # it asks DeepSpeed's own module for ranks, which joins the process group that exists
    patches.prepare()
    deepspeed.init_distributed(dist_backend=device.backend(), auto_mpi_discovery=False, verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds
        return MiniCPMPipeline(
            config,
            stage_bounds(config, recipe.model, recipe.parallel.pipeline_layers),
            labels,
            layers=layers,
            topology=topology,
        )


class _WithoutUpdate:
    """A schedule whose last instruction, the update, is left to the engine."""

    def __init__(self, whole: schedule.PipeSchedule) -> None:
        self.whole = whole

    def num_pipe_buffers(self) -> int:
        return self.whole.num_pipe_buffers()

    def __iter__(self) -> Iterator[list[Any]]:
        for commands in self.whole:
            yield [command for command in commands if not isinstance(command, schedule.OptimizerStep)]


class PipelinedEngine(Engine):
    """An `Engine` whose model is one stage of a pipeline."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sequence_length = self.recipe.data.sequence_length
        if self.config.fused_loss:
            engine = self.deepspeed
            engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {schedule.ForwardPass: _forward_with_labels}

    @staticmethod
    def _mpu() -> Any:
        return None  # DeepSpeed takes the pipeline's own grid

    def set_sequence_length(self, tokens: int) -> None:
        """Let stages tell each other anew what shape they send."""
        if tokens != self._sequence_length:
            self._sequence_length = tokens
            self.deepspeed.reset_activation_shape()

    def accumulate(
        self, micro_batches: Iterable[MicroBatch], count: int, objective: Objective = mean_token_loss
    ) -> torch.Tensor:
        """As `Engine.accumulate`, for an objective without fields; the mean is over all data-parallel ranks."""
        engine = self.deepspeed
        pipeline: Any = self.module
        pipeline.objective = objective
        self._scale_auxiliary_losses(count)
        engine.set_dataiterator(iter(micro_batches))
        engine.total_loss = engine.total_additional_losses = None
        engine._compute_loss = True
        engine._exec_schedule(_WithoutUpdate(engine._train_schedule()))
        with torch.no_grad():
            return engine._aggregate_total_loss()

    def loss_sum(self, rows: int, *batch: torch.Tensor) -> torch.Tensor:
        """As `Engine.loss_sum`, of which the last stages' mean over data-parallel ranks is on every rank."""
        self.set_sequence_length(batch[0].size(1))
        pipeline: Any = self.module
        pipeline.counted_rows = rows
        try:
            return self.deepspeed.eval_batch(iter([batch]), num_micro_batches=1).double().sum()
        finally:
            pipeline.counted_rows = None

    def _update(self) -> None:
        self.deepspeed._exec_optimizer_step()

    def train(self) -> None:
        """Training mode."""
        self.module.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self.module.eval()


def _forward_with_labels(engine: Any, buffer_id: int) -> None:
    """DeepSpeed's forward of one micro-batch, whose labels the head may see.

    The loss cannot wait for `loss_fn`: DeepSpeed 0.19 clears bf16 gradients when backward reaches what forward gave,
    and a head that is multiplied with after that would lose its gradient.
    """
    if engine.is_last_stage():
        engine.module.labels.now = engine.pipe_buffers["labels"][buffer_id]
    engine._exec_forward_pass(buffer_id)
