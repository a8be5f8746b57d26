"""One training engine over DeepSpeed: forward, backward and an update that never uses a gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from megatron.core import parallel_state

from minicpm_megatron.engine import experts, patches, zero1
from minicpm_megatron.engine.config import clips_itself, deepspeed_config
from minicpm_megatron.engine.objective import Objective, mean_token_loss, split_fields
from minicpm_megatron.methods.mup import RateLedger, mup_param_groups
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.experts import set_auxiliary_loss_scale
from minicpm_megatron.model.sharding import named_shards
from minicpm_megatron.parallel import device
from minicpm_megatron.parallel.groups import MegatronMPU
from minicpm_megatron.recipe import Layout, Recipe

MicroBatch = tuple[Any, ...]
"""(tokens, labels), int64 [b, s] each, where documents are kept apart the `starts` of model.document_attention, and
where the samples carry more for the objective a mapping of its tensors by name, [b, s] each."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        gradient_norm: 2-norm over all parameters of all ranks before clipping; inf or nan where a gradient was.
        applied: False when a gradient was not finite and the weights were left as they were.
    """

    gradient_norm: float
    applied: bool


class Engine:
    """The model of one rank with its optimizer under DeepSpeed.

    Args:
        model: a MiniCPMModel on this rank's device.
        config: the model's config.
        recipe, layout: what is run, and on how many ranks.
    """

    def __init__(self, model: torch.nn.Module, config: MiniCPMConfig, recipe: Recipe, layout: Layout) -> None:
        patches.prepare()
        self.recipe, self.layout, self.config = recipe, layout, config
        self.deepspeed_config = deepspeed_config(recipe, layout)
        # names are taken before ZeRO-3 replaces the parameters' storage
        self.names = {parameter: name for name, parameter, _ in named_shards(model, config)}
        self.ledger = RateLedger(config, recipe.optimizer.lr)
        groups = mup_param_groups(
            model,
            config,
            lr=recipe.optimizer.lr,
            weight_decay=recipe.optimizer.weight_decay,
            weight_decay_mode=recipe.optimizer.weight_decay_mode,
        )
        experts.mark(groups, layout)
        optimizer = _adamw(groups, recipe)
        if recipe.deepspeed.zero_stage == 3 and layout.context_parallel_size > 1:
            # DeepSpeed 0.19 itself would divide weights over the data-parallel ranks alone, and then look for their
            # parts on the context-parallel ones, too
            deepspeed.zero.Init(
                module=model,
                data_parallel_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                dtype=config.params_dtype,
                config_dict_or_path=self.deepspeed_config,
                mpu=self._mpu(),
            )
        with experts.shown_to_deepspeed(model, layout):
            self.deepspeed, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=self.deepspeed_config,
                mpu=self._mpu(),
                dist_init_required=False,
            )
        zero1.keep_gradients_flat(self.deepspeed.optimizer)
        _undo_first_step(self.deepspeed.optimizer)
        if recipe.deepspeed.zero_stage == 0:
            _accumulate_in_fp32(model)
        self._clips_itself = clips_itself(recipe)
        self._share = 1.0 if _averages_over_context(self.deepspeed_config) else 1.0 / layout.context_parallel_size
        self._norm = 0.0
        if hasattr(self.optimizer, "fp32_groups"):
            # DeepSpeed 0.19's FP16_UnfusedOptimizer takes the norm of tensor-parallel rank 0's shards for that of all
            clip = self.optimizer.unscale_and_clip_grads
            self.optimizer.unscale_and_clip_grads = lambda total_norm, apply_scale=True: clip(self._norm, apply_scale)
        self.check_rates(1.0)

    @staticmethod
    def _mpu() -> Any:
        return MegatronMPU()

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's wrapper of the optimizer."""
        return self.deepspeed.optimizer

    @property
    def module(self) -> torch.nn.Module:
        """The model."""
        return self.deepspeed.module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The muP groups, as the optimizer steps them."""
        return self.optimizer.param_groups

    def check_rates(self, factor: float) -> None:
        """Refuse to go on with rates that are not the muP table's; see `RateLedger.check`."""
        self.ledger.check(self.param_groups, factor)

    def set_rates(self, factor: float) -> None:
        """Give every group its rate where the schedule stands at `factor`."""
        self.ledger.apply(self.param_groups, factor)

    def set_global_batch_size(self, samples: int) -> int:
        """Accumulate over as many micro-batches as `samples` needs; returns that number."""
        if self.deepspeed.train_batch_size() != samples:
            self.deepspeed.set_train_batch_size(samples)
        return int(self.deepspeed.gradient_accumulation_steps())

    def set_sequence_length(self, tokens: int) -> None:
        """Told before every step how long the rows of its micro-batches are."""

    def accumulate(
        self, micro_batches: Iterable[MicroBatch], count: int, objective: Objective = mean_token_loss
    ) -> torch.Tensor:
        """Forward and backward of one step's micro-batches.

        Args:
            micro_batches: `count` of them.
            objective: what is minimised.

        Returns:
            Mean of the objective over them in nats, fp32, of this rank's tokens or of those of all ranks.
        """
        # DeepSpeed ends a step where its own count of micro-batches is a multiple of those of a step. After a batch
        # that grew, or a step that was discarded, that need not be where ours ends.
        self.deepspeed.micro_steps = 0
        self._scale_auxiliary_losses(count)
        total = torch.zeros((), device=device.device())
        for number, batch in enumerate(micro_batches, 1):
            tensors, fields = split_fields(batch)
            loss = objective(self.losses(*tensors), fields)
            total += loss.detach() / count
            self.backward(loss * self._share)
            if number < count:
                self.deepspeed.step()  # ends a micro-batch that is not the last of its step
        return total

    def _scale_auxiliary_losses(self, micro_batches: int) -> None:
        """Weigh the experts' losses as the step's mean does: each tensor- and context-parallel rank holds a part of
        them that is not divided by the number of these ranks, where its part of the cross-entropy is."""
        if self.config.num_moe_experts is not None:
            share = self._share * self.layout.context_parallel_size
            set_auxiliary_loss_scale(share / micro_batches, device.device())

    def loss_sum(self, rows: int, *batch: torch.Tensor) -> torch.Tensor:
        """Sum of the losses of the tokens in the first `rows` rows of a micro-batch, fp64, without gradients."""
        return self.losses(*batch)[:rows].double().sum()

    def losses(self, tokens: torch.Tensor, labels: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy in nats of every token of a micro-batch: fp32 [b, s]."""
        return self.deepspeed(tokens, attention_mask=starts, labels=labels)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's mean loss (averaged over accumulation and data-parallel ranks)."""
        self.deepspeed.backward(loss)

    def gradient_norm(self) -> float:
        """The 2-norm that `step` would report, without stepping; inf or nan where a gradient is not finite."""
        optimizer = self.optimizer
        if self.recipe.deepspeed.zero_stage == 0:
            return _gradient_norm(self._parameters_with_gradient(), self.layout)
        if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 in fp32, ZeRO 2
            norm = optimizer.scaled_global_norm()
        elif hasattr(optimizer, "get_grads_for_norm"):  # ZeRO 1 in bf16
            norm = experts.norm_of(optimizer.get_grads_for_norm(), optimizer.mpu)
        else:
            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        value = float(norm)  # compared on the host: on CUDA every look at the tensor waits for the device
        # one of DeepSpeed's functions says -1 for a norm that is not finite
        return value if value >= 0 else math.inf

    def discard(self) -> None:
        """End the last micro-batch of a step without an update: its gradients are dropped.

        Weights, moments and Adam's count of steps stay as they are in every bit, and the next step is the one of an
        engine that never saw the batch.
        """
        if self.recipe.deepspeed.zero_stage == 0:
            self.deepspeed.zero_grad()
            return
        # DeepSpeed itself drops gradients that are not finite, with all that it keeps beside them
        if self.recipe.deepspeed.offload_optimizer != "none":  # it knows gradients on the host by their norms
            norms = self.optimizer.norm_for_param_grads
            norms.update(dict.fromkeys(norms, torch.tensor(math.inf)))
        else:
            for gradient in self._accumulated():
                gradient.fill_(math.inf)
        self._update()
        self._forget_offloaded()

    def _forget_offloaded(self) -> None:
        """Drop what ZeRO 1 and 2 of DeepSpeed 0.19 would add to the next step: a refused step's offloaded gradients."""
        if self.recipe.deepspeed.offload_optimizer != "none" and self.recipe.deepspeed.zero_stage < 3:
            gradients = self.optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))

    def _accumulated(self) -> list[torch.Tensor]:
        """This rank's gradients where ZeRO keeps them at the end of a step's last micro-batch."""
        if hasattr(self.optimizer, "fp32_groups_gradients_flat"):  # ZeRO 1 in bf16
            return self.optimizer.fp32_groups_gradients_flat
        if hasattr(self.optimizer, "grad_partitions_flat_buffer"):  # ZeRO 3
            return [self.optimizer.grad_partitions_flat_buffer]
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group]

    def step(self) -> Update:
        """End the last micro-batch of a step: clip, and update unless a gradient is not finite."""
        if self.recipe.deepspeed.zero_stage == 0:
            return self._step_whole()
        skipped = self.deepspeed.skipped_steps
        self._update()
        applied = self.deepspeed.skipped_steps == skipped
        if not applied:
            self._forget_offloaded()
        norm = self.deepspeed.get_global_grad_norm()
        value = float("nan") if norm is None else float(norm)
        return Update(value, applied and math.isfinite(value))

    def _step_whole(self) -> Update:
        """The step where every rank holds whole gradients, in fp32."""
        parameters = self._parameters_with_gradient()
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        norm = _gradient_norm(parameters, self.layout)
        if not math.isfinite(norm):
            self.discard()  # the optimizer must not see it
            return Update(norm, applied=False)
        self._norm = norm
        limit = self.recipe.training.gradient_clipping
        if self._clips_itself and limit and norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        self._update()
        return Update(norm, applied=True)

    def _parameters_with_gradient(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.grad is not None]

    def _update(self) -> None:
        self.deepspeed.step()

    def train(self) -> None:
        """Training mode."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self.deepspeed.eval()


def _adamw(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW where the optimizer state is: torch's, or DeepSpeed's on the host of a CUDA device."""
    settings: dict[str, Any] = {
        "lr": recipe.optimizer.lr,
        "betas": recipe.optimizer.betas,
        "eps": recipe.optimizer.eps,
    }
    if recipe.deepspeed.offload_optimizer != "none" and not device.on_cpu():
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself when it is first made

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _accumulate_in_fp32(model: torch.nn.Module) -> None:
    """Have autograd add each micro-batch's gradients to an fp32 `grad`, also where parameters are bf16.

    At ZeRO 0 DeepSpeed 0.19 keeps no gradients of its own and refuses `grad_accum_dtype`, so that micro-batches would
    be added in bf16: over 2,048 of them the norm comes out 11 % too small. Call it after DeepSpeed's start, which sets
    bf16 gradients once.
    """
    for parameter in model.parameters():
        parameter.grad = None
        parameter.grad_dtype = torch.float32


def _gradient_norm(parameters: list[torch.nn.Parameter], layout: Layout) -> float:
    """2-norm over the ranks of one copy of the model; a parameter that several of them hold is counted once."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    mine = [
        p
        for p in parameters
        if (rank == 0 or getattr(p, "tensor_model_parallel", False)) and not getattr(p, "ds_pipe_replicated", False)
    ]
    divided = [p for p in mine if experts.is_divided(p)]
    square = _square([p for p in mine if not experts.is_divided(p)])
    dist.all_reduce(square, group=parallel_state.get_model_parallel_group())
    if layout.expert_model_parallel_size > 1:
        others = _square(divided)
        dist.all_reduce(others, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        square += others
    return float(square.sqrt())


def _square(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Sum of the squares of all gradients, fp32."""
    if not parameters:
        return torch.zeros((), dtype=torch.float32, device=device.device())
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    return torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()


def _averages_over_context(deepspeed_config: dict[str, Any]) -> bool:
    """Whether gradients of context-parallel ranks, each with a part of every sample's tokens, are averaged.

    DeepSpeed sums them, except where 0.19 scatters them at ZeRO 3.
    """
    zero = deepspeed_config["zero_optimization"]
    return zero["stage"] == 3 and zero.get("reduce_scatter", True)


def _undo_first_step(optimizer: Any) -> None:
    """Give bf16 at ZeRO 0 its initial weights back.

    DeepSpeed 0.19's FP16_UnfusedOptimizer steps once with zero gradients to allocate Adam's moments. That is no step
    of ours: it decays the master weights, and Adam's bias correction then believes that the first update is its
    second and makes it a quarter smaller.
    """
    if hasattr(optimizer, "fp32_groups"):
        with torch.no_grad():
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master in zip(low, high, strict=True):
                    master.copy_(parameter)
        optimizer.optimizer.state.clear()
