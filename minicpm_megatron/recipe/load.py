"""From text to a `Recipe`: file, then preset below it, then key=value overrides above it, then validation.

Everything that can be wrong with a recipe ends as one `UserError` line with the dotted key, where that key was
written (file:line or the override), what was given and what is allowed.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from minicpm_megatron.errors import UserError, shorten
from minicpm_megatron.recipe import yaml_text
from minicpm_megatron.recipe.presets import get_preset
from minicpm_megatron.recipe.schema import HANG_TIMEOUTS, ModelRecipe, Recipe, Section
from minicpm_megatron.recipe.sizes import model_of_size, parse_size
from minicpm_megatron.registry import OPTIMIZERS, SCHEDULES, Registry

S = TypeVar("S", bound=Section)
# section -> which of its keys names the entry whose options it holds, and where that entry is registered
_WITH_OPTIONS: dict[str, tuple[str, Registry[Any]]] = {
    "schedule": ("shape", SCHEDULES),
    "optimizer": ("name", OPTIMIZERS),
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, saved: bool = False) -> Recipe:
    """Read a recipe file.

    Args:
        path: YAML file; its name without suffix is the run's name where the recipe gives none.
        overrides: `section.key=value` with YAML values, applied in order; list entries by index
            (`data.train.0.prefix=x`).
        saved: the file was written by an earlier run; it is read as `build_saved` does.

    Raises:
        UserError: the file cannot be read, or is not a valid recipe.
    """
    path = Path(path)
    document = yaml_text.read(path, "the recipe")
    if not isinstance(document.value, dict):
        raise UserError("not a mapping of sections", where=str(path), fix="see docs/recipes.md for the keys")
    origins = {dotted: f"{path}:{line}" for dotted, line in document.lines.items()}
    fields = _within_bounds(document.value) if saved else document.value
    for override in overrides:
        dotted = apply_override(fields, override)
        origins = {known: place for known, place in origins.items() if not _is_below(known, dotted)}
        while dotted and dotted not in origins:  # sections that only the override mentions came from it too
            origins[dotted] = f"override {override!r}"
            dotted = dotted.rpartition(".")[0]
    fields.setdefault("name", path.stem)
    return build(fields, origins=origins | {"": str(path)})


def build(fields: Any, *, origins: Mapping[str, str] | None = None) -> Recipe:
    """A `Recipe` from plain nested values, the preset merged below `model`.

    Args:
        fields: as a YAML file would give them; a section that is None counts as empty.
        origins: dotted key -> where it was written, for error lines.

    Raises:
        UserError: as `load_recipe`, and `fields` are no mapping.
    """
    origins = origins or {}
    _refuse_no_mapping(fields, origins.get("", "recipe"))
    merged = {key: value for key, value in fields.items() if value is not None or _section_of(Recipe, key) is None}
    try:
        model, size = merged.get("model", {}), None
        if isinstance(model, dict) and "size" in model:
            model = {key: value for key, value in model.items() if key != "size"}
            merged["model"], size = model, fields["model"]["size"]
        _refuse_unknown_keys(Recipe, merged, "")
        for key, (naming, registry) in _WITH_OPTIONS.items():
            if key in merged:
                merged[key] = _with_options(key, merged[key], naming, registry)
        preset = merged.get("preset")
        if isinstance(preset, str) and isinstance(model, dict):
            merged["model"] = _over_preset(_scaled(get_preset(preset), model, size), model)
        elif size is not None:
            raise UserError("scales a preset, and there is none", where="model.size", fix="give a preset")
        return _validate(Recipe, merged)
    except UserError as error:
        raise _located(error, origins) from error


def build_saved(fields: Mapping[str, Any]) -> Recipe:
    """The `Recipe` of an earlier run from its manifest, which may hold a hang_timeout from before that had bounds.

    It decides nothing about the weights, and nobody can change it there: it is brought within the bounds. So is that
    of the recipe.yaml beside the manifest (`load_recipe(..., saved=True)`).

    Raises:
        UserError: as `build`.
    """
    return build(_within_bounds(fields))


def _within_bounds(fields: Mapping[str, Any]) -> dict[str, Any]:
    training = fields.get("training")
    if isinstance(training, Mapping) and isinstance(training.get("hang_timeout"), int | float):
        shortest, longest = HANG_TIMEOUTS
        kept = min(max(training["hang_timeout"], shortest), longest)
        fields = {**fields, "training": {**training, "hang_timeout": kept}}
    return dict(fields)


def build_section[S: Section](section: type[S], fields: Any, *, where: str) -> S:
    """One part of a recipe from a mapping of plain values, for example the ModelRecipe of a checkpoint's manifest.

    Raises:
        UserError: no mapping; unknown, missing, mistyped or contradicting fields; `where` leads the line.
    """
    _refuse_no_mapping(fields, where)
    try:
        _refuse_unknown_keys(section, fields, "")
        return _validate(section, dict(fields))
    except UserError as error:
        raise _located(error, {"": where}) from error


def build_options[S: Section](section: type[S], fields: Mapping[str, Any], *, key: str) -> S:
    """The keys that a registered entry has for itself, from the mapping at the dotted `key` of a recipe.

    Raises:
        UserError: as `build_section`; the line names the whole dotted key.
    """
    _refuse_unknown_keys(section, fields, f"{key}.")
    try:
        return _validate(section, dict(fields))
    except UserError as error:
        raise UserError(error.what, where=f"{key}.{error.where}", fix=error.fix) from error


def _with_options(key: str, section: Any, naming: str, registry: Registry[Any]) -> Any:
    """The section `key` with the options of the entry that its field `naming` names, defaults written out.

    What is malformed is left as it is.
    """
    if not isinstance(section, dict):
        return section
    kind = _section_of(Recipe, key)
    name = section.get(naming, kind.model_fields[naming].default if kind is not None else None)
    options = {} if section.get("options") is None else section["options"]
    if not isinstance(name, str) or not isinstance(options, Mapping):
        return section
    registry.check(name, where=f"{key}.{naming}")
    typed = build_options(registry.get(name).options, options, key=f"{key}.options")
    return section | {"options": typed.model_dump(mode="json")}


def _refuse_no_mapping(fields: Any, where: str) -> None:
    # of a file that is not a recipe's, such as a manifest or a config.json
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise UserError(f"{shorten(fields)} is no mapping of keys to values", where=where)


def apply_override(fields: dict[str, Any], override: str) -> str:
    """Set one `dotted.key=value` in nested dicts and lists, in place; returns the dotted key.

    Raises:
        UserError: no `=`, a value that is not YAML, or a list entry that does not exist.
    """
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    where = f"override {override!r}"
    if not equals or not all(dotted.split(".")):
        raise UserError("not of the form section.key=value", where=where, fix="for example training.seed=7")
    value = yaml_text.parse(text, source=where).value
    *parents, last = dotted.split(".")
    target: Any = fields
    for depth, key in enumerate((*parents, last), start=1):
        final = depth > len(parents)
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                raise UserError(
                    f"{'.'.join(dotted.split('.')[: depth - 1])} is a list of {len(target)}, without an entry {key}",
                    where=where,
                    fix="count from 0, or give the whole list",
                )
            index: Any = int(key)
        elif isinstance(target, dict):
            index = key
            if not final and target.get(key) is None:
                target[key] = {}
        else:
            raise UserError(f"{'.'.join(dotted.split('.')[: depth - 1])} is a single value", where=where)
        if final:
            target[index] = value
        else:
            target = target[index]
    return dotted


def known_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe can have, list entries as `*`."""
    for name in section.model_fields:
        dotted = f"{prefix}{name}"
        yield dotted
        inner = _section_of(section, name)
        if inner is not None:
            yield from known_keys(inner, f"{dotted}.*." if _is_list(section, name) else f"{dotted}.")


def _section_of(section: type[BaseModel], name: str) -> type[Section] | None:
    """The Section class below a field, directly or as the entry of a list."""
    if name not in section.model_fields:
        return None
    annotation = section.model_fields[name].annotation
    candidates = (annotation, *typing.get_args(annotation))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Section)), None)


def _is_list(section: type[BaseModel], name: str) -> bool:
    return typing.get_origin(section.model_fields[name].annotation) is tuple


def _refuse_unknown_keys(section: type[Section], fields: Mapping[str, Any], prefix: str) -> None:
    for key, value in fields.items():
        if key not in section.model_fields:
            raise UserError(f"unknown key {prefix}{key}", where=f"{prefix}{key}", fix=_suggestion(section, key, prefix))
        inner = _section_of(section, key)
        if inner is None:
            continue
        if isinstance(value, dict):
            _refuse_unknown_keys(inner, value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown_keys(inner, item, f"{prefix}{key}.{index}.")


def _suggestion(section: type[Section], key: str, prefix: str) -> str:
    key = key.lower()
    if (optional := _option(key, prefix)) is not None:
        return optional
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)  # "rl" must still find "lr"
    if near:
        return f"did you mean {prefix}{near[0]}?"
    leaves: dict[str, str] = {}
    for dotted in known_keys():
        leaves.setdefault(dotted.rpartition(".")[2], dotted)
    elsewhere = difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.8)
    if elsewhere:
        return f"did you mean {leaves[elsewhere[0]]}?"
    if not section.model_fields:
        return f"leave it out: {prefix.rstrip('.')} has no keys here"
    return f"known here are {', '.join(section.model_fields)}"


def _option(key: str, prefix: str) -> str | None:
    """Return the suggestion for a key that belongs one level deeper, into the options of an entry; else None."""
    if prefix.removesuffix(".") not in _WITH_OPTIONS:
        return None
    naming, registry = _WITH_OPTIONS[prefix.removesuffix(".")]
    for name in registry.names():
        try:
            options = registry.get(name).options
        except UserError:  # a package that is broken disturbs nobody who did not ask for it
            continue
        if key in options.model_fields:
            return f"did you mean {prefix}options.{key}, of {prefix}{naming}={name}?"
    return None


def _validate[S: Section](section: type[S], fields: dict[str, Any]) -> S:
    try:
        return section.model_validate(fields)
    except ValidationError as error:
        raise _first_error(section, error.errors(include_url=False)) from None


_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be text that UTF-8 has bytes for",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "too_short": "must have {min_length} entries or more",
    "too_long": "must have {max_length} entries or fewer",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "literal_error": "must be {expected}",
    "finite_number": "must be finite",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be greater than or equal to {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be less than or equal to {le}",
}
"""Type of pydantic's error -> what it asks for, as a format of the error's context."""


def _first_error(section: type[Section], errors: list[ErrorDetails]) -> UserError:
    error = errors[0]
    dotted = ".".join(str(part) for part in error["loc"] if part != "[key]")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if error["type"] == "missing":
        fix = "give it, or a preset" if dotted == "model" or dotted.startswith("model.") else "give it"
        return UserError(f"missing{more}", where=dotted, fix=fix)
    return UserError(f"{shorten(error['input'])} is refused, it {_rule(error)}{more}", where=dotted)


def _rule(error: ErrorDetails) -> str:
    """Say in the words of a recipe what pydantic asks of a value."""
    rule = _RULES.get(error["type"])
    if rule is not None:
        return rule.format(**{key: _with_commas(value) for key, value in error.get("ctx", {}).items()})
    return error["msg"].replace("Input should", "must").removeprefix("Value error, ")


def _with_commas(value: Any) -> Any:
    return f"{int(value):,}" if isinstance(value, (int, float)) and value == int(value) else value


def _over_preset(preset: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """What the user says over what the preset says, key by key in the sections inside, too."""
    inner = {
        key: preset[key] | value
        for key, value in model.items()
        if isinstance(value, dict) and isinstance(preset.get(key), dict)
    }
    return preset | model | inner


def _scaled(preset: ModelRecipe, model: dict[str, Any], size: Any) -> dict[str, Any]:
    """The preset's fields, in another size of its family where one is asked for."""
    fields = preset.model_dump()
    if size is None:
        return fields
    channels = model.get("kv_channels", preset.kv_channels)
    if not isinstance(channels, int) or channels < 1:
        return fields  # refused with its own line
    return fields | model_of_size(*parse_size(size, "model.size"), channels, "model.size")


def _is_below(dotted: str, ancestor: str) -> bool:
    return dotted == ancestor or dotted.startswith(ancestor + ".")


def _located(error: UserError, origins: Mapping[str, str]) -> UserError:
    """The same error with the place where its key, or the nearest section around it, was written."""
    key = error.where
    while key and key not in origins:
        key = key.rpartition(".")[0]
    place = origins.get(key, "")
    if place == error.where:
        return error
    dotted = "" if error.what.endswith(f" {error.where}") else error.where
    return UserError(error.what, where=": ".join(part for part in (place, dotted) if part), fix=error.fix)
