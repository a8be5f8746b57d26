"""One training engine over DeepSpeed: forward, backward and an update that never uses a gradient that is not finite.

What depends on the ZeRO stage, the precision and offloading is in the adapters of `engine.zero`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch

from minicpm_megatron.engine import experts, patches
from minicpm_megatron.engine.config import deepspeed_config
from minicpm_megatron.engine.objective import Objective, mean_token_loss, split_fields
from minicpm_megatron.engine.whole_matrices import WholeMatrices
from minicpm_megatron.engine.zero.adapter import Adapter, Update
from minicpm_megatron.engine.zero.choose import choose_adapter
from minicpm_megatron.methods.mup import RateLedger, mup_param_groups
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.experts import set_auxiliary_loss_scale
from minicpm_megatron.model.sharding import named_shards
from minicpm_megatron.parallel import device
from minicpm_megatron.parallel.groups import MegatronMPU
from minicpm_megatron.recipe import Layout, Recipe
from minicpm_megatron.recipe.optimizer import Optimizer
from minicpm_megatron.registry import OPTIMIZERS

MicroBatch = tuple[Any, ...]
"""(tokens, labels), int64 [b, s] each, where documents are kept apart the `starts` of model.document_attention, and
where the samples carry more for the objective a mapping of its tensors by name, [b, s] each."""


class Engine:
    """The model of one rank with its optimizer under DeepSpeed.

    Args:
        model: a MiniCPMModel on this rank's device.
        config: the model's config.
        recipe, layout: what is run, and on how many ranks.
        adapter: makes the adapter of DeepSpeed's optimizer from recipe, layout and DeepSpeed's JSON.

    Attributes:
        zero: what depends on the ZeRO stage, the precision and offloading.
        names, roles: of each parameter, in the whole model and in the muP table.
        optimizer_spec: what the optimizer that the recipe names says of itself.

    Raises:
        UserError: DeepSpeed has built an optimizer that the adapter does not know.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: MiniCPMConfig,
        recipe: Recipe,
        layout: Layout,
        adapter: Callable[[Recipe, Layout, dict[str, Any]], Adapter] = choose_adapter,
    ) -> None:
        patches.prepare()
        self.recipe, self.layout, self.config = recipe, layout, config
        self.deepspeed_config = deepspeed_config(recipe, layout)
        # names are taken before ZeRO-3 replaces the parameters' storage
        self.names = {parameter: name for name, parameter, _ in named_shards(model, config)}
        self.optimizer_spec: Optimizer = OPTIMIZERS.get(recipe.optimizer.name)
        lr_rules = self.optimizer_spec.lr_rules
        self.ledger = RateLedger(config, recipe.optimizer.lr, lr_rules)
        groups = mup_param_groups(
            model,
            config,
            lr=recipe.optimizer.lr,
            weight_decay=recipe.optimizer.weight_decay,
            weight_decay_mode=recipe.optimizer.weight_decay_mode,
            lr_rules=lr_rules,
        )
        experts.mark(groups, layout)
        # roles are taken before ZeRO replaces a group's parameters by a flat tensor
        self.roles = {parameter: group["name"] for group in groups for parameter in group["params"]}
        on_host = recipe.deepspeed.offload_optimizer != "none" and not device.on_cpu()
        optimizer = self.optimizer_spec.build(groups, recipe.optimizer, on_host)
        self.zero = adapter(recipe, layout, self.deepspeed_config)
        self.zero.prepare_model(model, config.params_dtype, self._mpu())
        with experts.shown_to_deepspeed(model, layout), self.zero.stand_in():
            self.deepspeed, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=self.deepspeed_config,
                mpu=self._mpu(),
                dist_init_required=False,
            )
        self.zero.attach(self.deepspeed, optimizer, self._update)
        if wanted := self.optimizer_spec.whole_matrices:
            optimizer.matrices = WholeMatrices(config, self.names, self.roles, wanted, self.zero)
        self._share = 1.0 if self.zero.averages_over_context else 1.0 / layout.context_parallel_size
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
        return self.zero.gradient_norm()

    def discard(self) -> None:
        """End the last micro-batch of a step without an update: its gradients are dropped.

        Weights, moments and Adam's count of steps stay as they are in every bit, and the next step is the one of an
        engine that never saw the batch.
        """
        self.zero.discard()

    def step(self) -> Update:
        """End the last micro-batch of a step: clip, and update unless a gradient is not finite."""
        return self.zero.step()

    def _update(self) -> None:
        self.deepspeed.step()

    def train(self) -> None:
        """Training mode."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self.deepspeed.eval()
