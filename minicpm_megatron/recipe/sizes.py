"""Sizes of the family of Table 8, written WIDTHxLAYERS: `model.size` of a recipe, `--sizes` of the wind tunnel."""

from __future__ import annotations

from minicpm_megatron.errors import UserError


def parse_size(text: str, where: str) -> tuple[int, int]:
    """(width, layers) of WIDTHxLAYERS.

    Raises:
        UserError: at `where`, `text` is of another form.

    >>> parse_size("512x8", "--size")
    (512, 8)
    """
    width, _, layers = str(text).lower().partition("x")
    if not (width.isdecimal() and layers.isdecimal() and int(width) and int(layers)):
        raise UserError(f"{text!r} is no size", where=where, fix="give WIDTHxLAYERS, for instance 64x2")
    return int(width), int(layers)


def model_of_size(width: int, layers: int, channels: int, where: str) -> dict[str, int]:
    """The shape of a model in the family of Table 8: d_ff = 2.5 d_model, heads of `channels`, each with key and value.

    Raises:
        UserError: at `where`, the width is no multiple of `channels`, or odd.
    """
    if width % channels or width * 5 % 2:
        raise UserError(
            f"a width of {width} does not divide into heads of {channels} channels",
            where=where,
            fix=f"give multiples of {channels}, or another model.kv_channels",
        )
    return {
        "num_layers": layers,
        "hidden_size": width,
        "ffn_hidden_size": width * 5 // 2,
        "num_attention_heads": width // channels,
        "num_query_groups": width // channels,
    }
