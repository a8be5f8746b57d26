"""Text from any folder that can be converted: our checkpoints and every published format alike.

The model is built in memory as transformers' Granite, or GraniteMoe for a mixture of experts, which have exactly
MiniCPM's multipliers, and transformers generates: cache, sampling and stopping are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minicpm_megatron.convert.formats import granite, granitemoe
from minicpm_megatron.convert.operation import open_source
from minicpm_megatron.convert.prompts import open_prompts
from minicpm_megatron.convert.sampling import Sampling
from minicpm_megatron.convert.source import Source
from minicpm_megatron.convert.text_settings import SpecialTokens, choose_tokens
from minicpm_megatron.errors import UserError

_LOGIT_ROWS = 1024  # at 122,753 words half a GiB of logits
_GRANITEMOE_5 = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "router.weight",
}


class Generator:
    """A model with its tokenizer, ready to continue prompts.

    Args:
        folder: checkpoint of ours or published folder.
        tokenizer: folder of tokenizer files; default: the one that belongs to the model.
        dtype: of weights and activations; default: fp32 on the CPU, bf16 on CUDA.

    Raises:
        UserError: the folder is no model, no tokenizer is known for it, or the tokenizer has more pieces than the
            model's vocabulary.
    """

    def __init__(self, folder: Path, tokenizer: Path | None = None, *, dtype: torch.dtype | None = None) -> None:
        source = open_source(folder)
        pieces = tokenizer or source.tokenizer
        if pieces is None:
            raise UserError("no tokenizer is known for this model", where=str(folder), fix="give --tokenizer DIR")
        self.prompts = open_prompts(pieces)
        if self.prompts.pieces > source.model.vocab_size:
            raise UserError(
                f"the tokenizer has {self.prompts.pieces} pieces, the model's vocabulary {source.model.vocab_size}",
                where=str(pieces),
                fix="give the tokenizer that the model was trained with",
            )
        self.tokenizer_folder = pieces
        named = self.prompts.named
        tokens, _ = choose_tokens(
            source.text, named if named.ends else None, replaced=tokenizer not in (None, source.tokenizer)
        )
        self.ends = source.text.ends(tokens)
        self.model = as_granite(source, dtype)
        self.longest = source.model.longest_sequence
        self.unscaled = source.model.max_position_embeddings
        self.vocab_size = source.model.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the begin token first."""
        return self.prompts.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special ones left out."""
        return self.prompts.decode(tokens)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], last: int) -> torch.Tensor:
        """fp32 [last, vocabulary] on the CPU: what the last positions of `tokens` say about the token after each."""
        self._forget_lengths()
        ids = torch.tensor([list(tokens)], device=self.model.device)
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0]
        return logits.float().cpu()

    @torch.no_grad()
    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """fp32 [n - 1] on the CPU: nats of each of `tokens` after the first, those before it given."""
        self._forget_lengths()
        ids = torch.tensor([list(tokens)], device=self.model.device)
        hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[0]
        parts = []
        for states, labels in zip(hidden.split(_LOGIT_ROWS), ids[0, 1:].split(_LOGIT_ROWS), strict=True):
            logits = self.model.lm_head(states).float() / self.model.config.logits_scaling
            parts.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def continue_tokens(self, tokens: Sequence[int], sampling: Sampling) -> list[int]:
        """What comes after `tokens`, up to and without the first end token; never more tokens than the context holds.

        Where dynamic scaling acts, a cache would hold keys that an older base turned, so each step computes the whole
        sequence anew: the text is that of the model as it was trained.
        """
        self._forget_lengths()
        torch.manual_seed(sampling.seed)
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        new = min(sampling.max_new_tokens, self.longest - len(tokens))
        ids = torch.tensor([list(tokens)], device=self.model.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            # without one, transformers would take the configuration's
            eos_token_id=list(self.ends) or [-1],
            pad_token_id=self.ends[0] if self.ends else 0,
            use_cache=len(tokens) + new <= self.unscaled,
            **choice,
        )
        found: list[int] = output[0, len(tokens) :].tolist()
        end = next((place for place, token in enumerate(found) if token in self.ends), len(found))
        return found[:end]

    def greedy(self, tokens: Sequence[int], new: int) -> list[int]:
        """The likeliest continuation, `new` tokens at most."""
        return self.continue_tokens(tokens, Sampling(max_new_tokens=new, temperature=0.0))

    def _forget_lengths(self) -> None:
        """Undo what transformers keeps of the longest sequence so far, so that a result depends on its own alone."""
        rotary = self.model.model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq.clone()
        rotary.max_seq_len_cached = rotary.original_max_seq_len

    def continue_text(
        self, prompt: str, sampling: Sampling, on_full_context: Callable[[int], object] = lambda new: None
    ) -> str:
        """The prompt with its continuation.

        Args:
            on_full_context: called with the number of new tokens where the model's context held no more of them,
                though neither an end token came nor `sampling.max_new_tokens` were made.

        Raises:
            UserError: the prompt alone is longer than the model's context.
        """
        tokens = self.encode(prompt)
        if len(tokens) >= self.longest:
            raise UserError(
                f"{len(tokens)} tokens do not fit a context of {self.longest}", where="--prompt", fix="shorten it"
            )
        new = self.continue_tokens(tokens, sampling)
        if len(new) == self.longest - len(tokens) < sampling.max_new_tokens:
            on_full_context(len(new))
        return self.decode(tokens + new)


def as_granite(source: Source, dtype: torch.dtype | None = None) -> Any:
    """The source as transformers' Granite(Moe)ForCausalLM in evaluation mode; dtype as for `Generator`."""
    from transformers import GraniteConfig, GraniteForCausalLM, GraniteMoeConfig, GraniteMoeForCausalLM

    sparse = source.model.num_moe_experts is not None
    default, device = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    layout = granitemoe.FORMAT if sparse else granite.FORMAT
    fields = layout.write_config(source.model, SpecialTokens(), "float32")
    model: Any = (
        GraniteMoeForCausalLM(GraniteMoeConfig(**fields)) if sparse else GraniteForCausalLM(GraniteConfig(**fields))
    )
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        # not model.to(dtype): in bf16 the rotary frequencies would be wrong by 0.4 radians at position 1,000
        parameter.data = parameter.data.to(dtype or default)
    with torch.no_grad():
        for group in layout.export_groups(source.model):
            tensors = [source.tensors.read(name) for name in group.canonical]
            for name, value in group.to_published(tensors, source.model).items():
                parameters[_in_memory(name)].copy_(value)
    return model.to(device).eval()


def _in_memory(name: str) -> str:
    """The parameter of transformers 5 that a tensor of a GraniteMoe folder is loaded into."""
    for stored, parameter in _GRANITEMOE_5.items():
        name = name.replace(stored, parameter)
    return name
