"""End tokens and settings for generation that a model's folder states.

A tokenizer knows one end token at most and no settings; config.json and generation_config.json have the rest. Both
travel with the model: through our checkpoints, and the runs that go on from them, as `RunState.text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.convert.config_fields import read_json
from minicpm_megatron.errors import UserError

GENERATION = "generation_config.json"
TEXT_STATE = "text"
"""Key of these settings in a torch_dist checkpoint that a conversion of ours has written."""
_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SETTINGS_KEY = "generation_config"
_LARGEST_SETTINGS = 2**20
# sampling settings of every released MiniCPM
_RELEASED = {"do_sample": True, "top_p": 0.8, "temperature": 0.8}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the begin, end and padding tokens; the defaults are those of every released MiniCPM.

    Attributes:
        eos: one id, several of which each ends a text, or None.
    """

    bos: int | None = 1
    eos: int | tuple[int, ...] | None = 2
    pad: int | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        return _listed(self.eos)

    def fields(self) -> dict[str, Any]:
        """As config.json and generation_config.json have them."""
        eos = list(self.eos) if isinstance(self.eos, tuple) else self.eos
        padding = {} if self.pad is None else {"pad_token_id": self.pad}
        return {"bos_token_id": self.bos, "eos_token_id": eos} | padding

    def covers(self, other: SpecialTokens) -> bool:
        """Return whether these tokens include the begin token and all end tokens that `other` states."""
        return other.bos in (None, self.bos) and set(other.ends) <= set(self.ends)


@dataclass(frozen=True)
class TextSettings:
    """End tokens and settings for generation that a folder states.

    Attributes:
        tokens: as in config.json; None where it says nothing.
        generation: content of generation_config.json, empty where a published folder has none; None: the model is
            ours and has never had one.
    """

    tokens: SpecialTokens | None = None
    generation: Mapping[str, Any] | None = None

    def with_tokens(self, tokens: SpecialTokens) -> dict[str, Any]:
        """generation_config.json of a model whose config.json has `tokens`."""
        if self.generation is None:
            return _RELEASED | tokens.fields()
        # a folder may let a text end otherwise than its config.json says; that is meant for whoever generates
        own = self.tokens == tokens and any(key in self.generation for key in _KEYS)
        return dict(self.generation) if own else dict(self.generation) | tokens.fields()

    def ends(self, tokens: SpecialTokens) -> tuple[int, ...]:
        """Every id that ends a text of a model whose config.json has `tokens`, when it is generated."""
        return _listed(self.with_tokens(tokens).get("eos_token_id"))

    def replaced(self, tokens: SpecialTokens) -> TextSettings:
        """These settings for a tokenizer with other tokens; what was not said stays so."""
        if self.tokens in (None, tokens):
            return self
        return TextSettings(tokens, None if self.generation is None else self.with_tokens(tokens))

    def state(self) -> dict[str, Any]:
        """JSON values that `of_state` understands."""
        tokens = self.tokens.fields() if self.tokens else {}
        return tokens | ({} if self.generation is None else {_SETTINGS_KEY: dict(self.generation)})


def read_text_settings(folder: Path, config: Mapping[str, Any], vocab_size: int, where: str) -> TextSettings:
    """The settings of a published folder.

    Args:
        config: content of its config.json, at `where`.

    Raises:
        UserError: a token is no id of the vocabulary, or generation_config.json is malformed.
    """
    path = folder / GENERATION
    generation = read_json(path, _LARGEST_SETTINGS) if path.is_file() else {}
    stated = _tokens(generation, vocab_size, str(path))
    return TextSettings(_tokens(config, vocab_size, where) or stated, generation)


def of_state(state: Any, vocab_size: int, where: str) -> TextSettings:
    """The settings that a checkpoint of ours keeps.

    Raises:
        UserError: they are malformed.
    """
    if state is None:
        return TextSettings()
    generation = state.get(_SETTINGS_KEY) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not (generation is None or isinstance(generation, dict)):
        raise UserError(f"{TEXT_STATE} is malformed", where=where)
    _tokens(generation or {}, vocab_size, where)
    return TextSettings(_tokens(state, vocab_size, where), generation)


def choose_tokens(
    settings: TextSettings, of_tokenizer: SpecialTokens | None, *, replaced: bool
) -> tuple[SpecialTokens, str | None]:
    """The tokens of a model, and a note where its tokenizer has others.

    Args:
        of_tokenizer: None where its files do not say.
        replaced: the tokenizer is not the model's own, so that ids of the old one mean nothing.
    """
    stated = settings.tokens
    if stated is None or of_tokenizer is None:
        return stated or of_tokenizer or SpecialTokens(), None
    if stated.covers(of_tokenizer):
        return stated, None
    chosen, other = (of_tokenizer, stated) if replaced else (stated, of_tokenizer)
    names = ("the tokenizer", "the model's configuration")
    kept, left = names if replaced else reversed(names)
    return chosen, (
        f"a text begins with {chosen.bos} and ends with {_said(chosen)}, as {kept} says; {left} says {other.bos} and"
        f" {_said(other)}"
    )


def _listed(eos: Any) -> tuple[int, ...]:
    return tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)


def _said(tokens: SpecialTokens) -> str:
    return " or ".join(map(str, tokens.ends)) or "nothing"


def _tokens(fields: Mapping[str, Any], vocab_size: int, where: str) -> SpecialTokens | None:
    """The tokens among some fields, the published default for one that is absent; None where all are."""
    if not any(key in fields for key in _KEYS):
        return None
    stated = SpecialTokens().fields() | {key: fields[key] for key in _KEYS if key in fields}
    bos, eos, pad = (stated.get(key) for key in _KEYS)
    for key, tokens in (("bos_token_id", () if bos is None else (bos,)), ("eos_token_id", _listed(eos))):
        for token in tokens:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise UserError(f"{key} {token!r} is no id of a vocabulary of {vocab_size}", where=where)
    # some folders have -1 for none
    if pad is not None and type(pad) is not int:
        raise UserError(f"pad_token_id {pad!r} is no id", where=where)
    return SpecialTokens(bos, tuple(eos) if isinstance(eos, list) else eos, pad)
