"""What a published format is: a name table, a way to write its configuration and a way to read one.

The shared half of every Llama-like config.json is here, with the refusals that keep a folder from being imported as
something it is not. A format adds its own multipliers in its own file under `formats/`, or in another package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minicpm_megatron.convert.config_fields import number, refuse_endless
from minicpm_megatron.convert.mapping import EMBEDDING, HEAD, Group, Row, expand
from minicpm_megatron.convert.multipliers import NOTE_KEY, read_note, same_multipliers, write_note
from minicpm_megatron.convert.refused_keys import refuse_unimplemented
from minicpm_megatron.convert.rope import read_rope, rope_note, with_noted_scaling, write_rope
from minicpm_megatron.convert.text_settings import SpecialTokens
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, build_section

Fields = dict[str, Any]
CONFIG = "config.json"
EXPERTS_A_TOKEN = "num_experts_per_tok"


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
        name: what `--to` takes.
        model_type, architecture: how its config.json identifies it.
        rows: the name table of a dense model; empty where the format holds none.
        sparse_rows: the name table of a mixture of experts; empty where the format holds none.
        experts_key: config.json's key for the number of experts; None where the format holds none.
        write: the configuration fields that say the model's multipliers, merged over the common ones.
        read: config.json -> the `ModelRecipe` fields that the common ones leave open (multipliers).
        check: raises UserError for a model that the format cannot hold.
        tied_by_default: meaning of a config.json without tie_word_embeddings.
        always_untied: writes a tied model's head out as a tensor of its own.
    """

    name: str
    model_type: str
    architecture: str
    rows: Sequence[Row]
    write: Callable[[ModelRecipe], Fields]
    read: Callable[[Mapping[str, Any], ModelRecipe], Fields]
    check: Callable[[ModelRecipe], None]
    tied_by_default: bool = False
    always_untied: bool = False
    sparse_rows: Sequence[Row] = ()
    experts_key: str | None = None

    @property
    def folds(self) -> bool:
        """Whether multipliers live inside the weights."""
        return any(row.fold for row in (*self.rows, *self.sparse_rows))

    def table(self, model: ModelRecipe) -> Sequence[Row]:
        """The name table of a model of this kind, dense or sparse; empty where the format does not hold it."""
        return self.rows if model.num_moe_experts is None else self.sparse_rows

    def check_kind(self, model: ModelRecipe, others: Iterable[Format] = ()) -> None:
        """Raise UserError unless the format holds models of this kind, with those of `others` that do."""
        if not self.table(model):
            fitting = in_order(other for other in others if other.table(model))
            raise UserError(
                f"this format holds {'dense models' if self.rows else 'mixtures of experts'} only",
                where=f"--to {self.name}",
                fix=f"use {' or '.join(other.name for other in fitting)}" if fitting else "",
            )
        if model.qk_layernorm:
            raise UserError(
                "no published format here has the norm of queries and keys",
                where=f"--to {self.name}",
                fix="only a model trained with model.qk_layernorm false can be published",
            )
        if model.num_moe_experts is not None and model.moe_router_pre_softmax:
            raise UserError(
                "the weights of a token's experts are renormalised in every published format, and "
                "moe_router_pre_softmax leaves them as they are",
                where=f"--to {self.name}",
                fix="only a model trained with moe_router_pre_softmax false can be published",
            )

    def export_groups(self, model: ModelRecipe) -> list[Group]:
        """The tensors to write for `model`."""
        if model.untie_embeddings_and_output_weights:
            return expand(self.table(model), model)
        if not self.always_untied:
            return self.import_groups(model)
        table = self.table(model)
        return expand([dataclasses.replace(r, kind=EMBEDDING) if r.kind == HEAD else r for r in table], model)

    def import_groups(self, model: ModelRecipe) -> list[Group]:
        """The tensors that make up `model`; the head of a tied one is its embedding and no tensor."""
        tied = not model.untie_embeddings_and_output_weights
        return expand([row for row in self.table(model) if not (tied and row.kind == HEAD)], model)

    def write_config(self, model: ModelRecipe, tokens: SpecialTokens, dtype: str) -> Fields:
        """config.json of `model`.

        Raises:
            UserError: the format cannot hold this model.
        """
        self.check_kind(model)
        self.check(model)
        sparse = model.num_moe_experts is not None
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.mlp_width,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "hidden_act": "silu",
            "max_position_embeddings": model.max_position_embeddings,
            "initializer_range": model.init_method_std,
            "rms_norm_eps": model.norm_epsilon,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
            **tokens.fields(),
            **write_rope(model),
            # only an explicit value is read alike by every program
            "tie_word_embeddings": not (self.always_untied or model.untie_embeddings_and_output_weights),
            # the older and the newer name of the same thing
            "torch_dtype": dtype,
            "dtype": dtype,
            NOTE_KEY: write_note(model) | rope_note(model),
            **(
                {str(self.experts_key): model.num_moe_experts, EXPERTS_A_TOKEN: model.moe_router_topk} if sparse else {}
            ),
        } | self.write(model)

    def read_config(self, config: Mapping[str, Any], where: str) -> ModelRecipe:
        """The model that a config.json describes; whether it is tied may still be corrected by its tensors.

        Raises:
            UserError: something in it is not a MiniCPM-shaped model, or missing, or of another type.
        """
        native = build_section(ModelRecipe, self._common_fields(config, where), where=where)
        try:
            native = build_section(ModelRecipe, native.model_dump() | self.read(config, native), where=where)
        except UserError as error:
            raise error if error.where else UserError(error.what, where=where, fix=error.fix) from None
        native = with_noted_scaling(native, config)
        if self.folds and not native.untie_embeddings_and_output_weights:
            # one tensor cannot hold two folds: whoever tied it again made a plain model of it
            return native
        sparse = native.num_moe_experts is not None
        note = read_note(config, sparse=sparse, where=where)
        note.pop("untie_embeddings_and_output_weights", None)
        noted = build_section(ModelRecipe, native.model_dump() | note, where=f"{where}: {NOTE_KEY}")
        # a configuration edited by hand is right against a note that was not
        return noted if self.folds or same_multipliers(native, noted) else native

    def _common_fields(self, config: Mapping[str, Any], where: str) -> Fields:
        try:
            refuse_endless(config)
            refuse_unimplemented(config)
            return _dense_fields(config, self.tied_by_default) | self._expert_fields(config)
        except UserError as error:
            raise error if error.where else UserError(error.what, where=where, fix=error.fix) from None

    def _expert_fields(self, config: Mapping[str, Any]) -> Fields:
        for key in ("num_experts", "num_local_experts"):
            if key != self.experts_key and config.get(key):
                raise UserError(f"{key} is set", fix=f"{self.name} holds {self.experts_key or 'dense models only'}")
        experts = config.get(self.experts_key) if self.experts_key else None
        if not experts:
            if not self.rows:
                raise UserError(f"{self.experts_key} is missing")
            return {}
        if EXPERTS_A_TOKEN not in config:
            raise UserError(f"{EXPERTS_A_TOKEN} is missing")
        return {
            "num_moe_experts": experts,
            "moe_router_topk": config[EXPERTS_A_TOKEN],
            "moe_ffn_hidden_size": config["intermediate_size"],
        }

    def noted_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the note says that the exported model was tied."""
        return read_note(config).get("untie_embeddings_and_output_weights") is False


def as_format(entry: Any) -> Format:
    """The format that a file here or another package has registered.

    Raises:
        TypeError: it is none, or its tables lack what every model has.
    """
    if not isinstance(entry, Format):
        raise TypeError(f"an export format must be a Format, not {type(entry).__name__}")
    tables = [table for table in (entry.rows, entry.sparse_rows) if table]
    if not tables or any(not {EMBEDDING, HEAD} <= {row.kind for row in table} for table in tables):
        raise TypeError("an export format needs a table with rows for embedding and head")
    return entry


def in_order(layouts: Iterable[Format]) -> list[Format]:
    """Formats as a line offers them: first those with a head that every program finds, of these the unfolded ones."""
    return sorted(layouts, key=lambda layout: (not layout.always_untied, layout.folds, layout.name))


def refuse_uneven_heads(model: ModelRecipe, format_name: str) -> None:
    """Refuse a head width that a format without a field for it would take for hidden_size / heads."""
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise UserError(
            f"{model.num_attention_heads} heads of {model.kv_channels} channels do not make up hidden_size "
            f"{model.hidden_size}, and this format has no field for the head width",
            where=f"--to {format_name}",
        )


def _dense_fields(config: Mapping[str, Any], tied_by_default: bool) -> Fields:
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{key} {config[key]!r} is not supported", fix=f"only {wanted!r} can be imported")
    if config.get("quantization_config"):
        raise UserError("quantization_config is set", fix="only plain weights can be imported")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if key not in config]:
        raise UserError(f"{', '.join(missing)} missing")
    # defaults below are those of the published configuration classes, for folders that leave a key out
    tied = config.get("tie_word_embeddings", tied_by_default)
    if not isinstance(tied, bool):
        raise UserError(f"tie_word_embeddings must be true or false, not {tied!r}")
    longest = config.get("max_position_embeddings", 2048)
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config.get("num_key_value_heads"),
        "kv_channels": config.get("head_dim"),
        "max_position_embeddings": longest,
        **read_rope(config, longest),
        "norm_epsilon": number(config, "rms_norm_eps", 1e-6),
        "init_method_std": number(config, "initializer_range", 0.02),
        "untie_embeddings_and_output_weights": not tied,
    }
