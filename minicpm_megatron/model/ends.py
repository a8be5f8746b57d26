"""Parts of MiniCPM's language models before the first layer and after the last, in the place of Megatron-Core's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from minicpm_megatron.errors import require
from minicpm_megatron.methods.rope import rope_of
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.head import LanguageModelHead
from minicpm_megatron.model.loss import token_losses
from minicpm_megatron.model.rope import MiniCPMRotaryEmbedding

KEYWORDS = ("pre_process", "post_process", "parallel_output", "pg_collection", "vp_stage")


class MiniCPMEnds(LanguageModule):
    """Rotary positions with a scaled base, an LM head that knows its loss, no probability for vocabulary padding."""

    config: MiniCPMConfig
    post_process: bool

    @staticmethod
    def arguments(config: MiniCPMConfig) -> dict[str, Any]:
        """Return the arguments that the constructors of GPTModel and HybridModel share."""
        return {
            "vocab_size": config.padded_vocab_size(),
            "max_sequence_length": config.max_position_embeddings,
            "share_embeddings_and_output_weights": not config.untie_embeddings_and_output_weights,
            "position_embedding_type": "rope",
            "rotary_base": config.rotary_base,
        }

    @classmethod
    def check_keywords(cls, keywords: Mapping[str, Any]) -> None:
        """Refuse arguments of GPTModel or HybridModel that `replace_ends` would undo, or that are not MiniCPM's.

        Raises:
            UserError: naming the first.
        """
        for name in keywords:
            require(
                name in KEYWORDS,
                cls.__name__,
                f"{name} is decided by the config, or is not MiniCPM's",
                f"leave it out; it takes {', '.join(KEYWORDS)}",
            )

    def replace_ends(self) -> None:
        """Replace what the constructor of GPTModel or HybridModel has built."""
        self.rotary_pos_emb = MiniCPMRotaryEmbedding(
            rope_of(self.config), on_cpu=bool(self.config.use_cpu_initialization), cp_group=self.pg_collection.cp
        )
        if self.post_process:
            self.output_layer = LanguageModelHead.taking_over(self.get_submodule("output_layer"))

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """`loss.token_losses` of [s, b, local or whole vocabulary] logits against [b, s] labels."""
        return token_losses(self.config, logits, labels, training=self.training)

    def fused_losses(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor | None) -> Tensor:
        """Losses without logits, fp32 [b, s], of [s, b, hidden_size] after the final norm against [b, s] labels."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=weight, labels=labels, loss_mask=loss_mask)
