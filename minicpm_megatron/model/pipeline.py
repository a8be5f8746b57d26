"""The layers of MiniCPMModel one by one, each a function of the one tensor that the layer before it returns.

A pipeline cuts this list anywhere. The modules are those of `layer_spec` and the linears and norms that
GPTModel is made of, so a pipeline of one stage computes what MiniCPMModel computes, bit for bit. `global_prefix` of a
module says what its parameters are called in the whole model: (beginning of the name here, beginning there).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from minicpm_megatron.methods.rope import Rope, rope_of
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.head import LanguageModelHead
from minicpm_megatron.model.layer_spec import layer_spec
from minicpm_megatron.model.norm import MiniCPMFinalNorm
from minicpm_megatron.model.rope import MiniCPMRotaryEmbedding


class PipelineEmbedding(torch.nn.Module):
    """Token embedding; where it is tied it is the LM head, too, and the first and the last stage each hold a copy."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.global_prefix = ("embedding.", "embedding.")
        self.embedding = LanguageModelEmbedding(
            config=_single_stage(config),
            vocab_size=config.padded_vocab_size(),
            max_sequence_length=config.max_position_embeddings,
            position_embedding_type="rope",
        )
        self.output_layer = (
            None if config.untie_embeddings_and_output_weights else LanguageModelHead.build(config, tied=True)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] -> [s, b, hidden_size]; s is a rank's own part under sequence parallelism."""
        return self.embedding(input_ids=tokens, position_ids=None)

    def head(self, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        """As `PipelineHead.forward`."""
        assert self.output_layer is not None, "an untied head is a module of its own"
        return _logits_or_losses(self.output_layer, hidden_states, labels, self.embedding.word_embeddings.weight)


class PipelineLayer(torch.nn.Module):
    """One transformer layer; `number` counts from 1 over the whole model."""

    def __init__(self, config: MiniCPMConfig, number: int) -> None:
        super().__init__()
        self.global_prefix = ("layer.", f"decoder.layers.{number - 1}.")
        self.config = config
        self.layer = build_module(layer_spec(config), config=_single_stage(config), layer_number=number)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, hidden_size] -> the same shape."""
        length = hidden_states.size(0)
        if self.config.sequence_parallel:
            length *= self.config.tensor_model_parallel_size
        rotary = _rotary(rope_of(self.config), self.config.use_cpu_initialization)(length)

        def run(states: Tensor) -> Tensor:
            return self.layer(hidden_states=states, attention_mask=None, rotary_pos_emb=rotary)[0]

        if self.training and self.config.recompute_granularity == "full":
            return tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, hidden_states)
        return run(hidden_states)


class PipelineFinalNorm(torch.nn.Module):
    """The norm before the LM head."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.global_prefix = ("norm.", "decoder.final_layernorm.")
        self.norm = MiniCPMFinalNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, hidden_size] -> the same shape."""
        return self.norm(hidden_states)


@dataclass
class Labels:
    """Where the last stage's head finds the labels of the micro-batch that passes: a layer is given one tensor.

    Attributes:
        now: int64 [b, s], or None where the head is to make logits.
    """

    now: Tensor | None = None


class PipelineHead(torch.nn.Module):
    """An LM head with weights of its own."""

    def __init__(self, config: MiniCPMConfig, labels: Labels) -> None:
        super().__init__()
        self.global_prefix = ("output_layer.", "output_layer.")
        self.labels = labels
        self.output_layer = LanguageModelHead.build(config, tied=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, hidden_size] after the final norm -> fp32 [b, s], losses in nats; without labels logits [s, b, local
        vocabulary]."""
        return _logits_or_losses(self.output_layer, hidden_states, self.labels.now)


def _logits_or_losses(
    head: LanguageModelHead, hidden_states: Tensor, labels: Tensor | None, weight: Tensor | None = None
) -> Tensor:
    if labels is None:
        return head(hidden_states, weight=weight)[0]
    return head(hidden_states, weight=weight, labels=labels)


def _single_stage(config: MiniCPMConfig) -> MiniCPMConfig:
    """The config as modules want it that are told their place: Megatron-Core would add its own stage's offset."""
    single = copy.copy(config)
    single.pipeline_model_parallel_size = 1
    return single


@lru_cache(maxsize=1)
def _rotary(rope: Rope, on_cpu: bool) -> MiniCPMRotaryEmbedding:
    """One table for all layers of a stage."""
    return MiniCPMRotaryEmbedding(rope, on_cpu=on_cpu)


def pipeline_parts(config: MiniCPMConfig) -> list[str]:
    """What the list is made of, in order: embedding, layers, final norm, head."""
    return ["embedding", *["layer"] * config.num_layers, "norm", "head"]
