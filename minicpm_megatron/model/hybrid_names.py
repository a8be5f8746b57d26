"""Names of parameters in Megatron-Core's two forms of the same model, GPTModel and HybridModel.

Transformer layer i of a GPTModel is layer 2i (attention) and layer 2i + 1 (MLP or experts) of a HybridModel. Everything
that this package stores has the names of GPTModel, so that checkpoints of one form load into the other.
"""

from __future__ import annotations

from minicpm_megatron.errors import UserError

LAYERS = "decoder.layers."
FINAL_NORM = ("decoder.final_layernorm.", "decoder.final_norm.")  # in GPTModel, in HybridModel
ATTENTION = ("input_layernorm.", "self_attention.")
MLP = ("pre_mlp_layernorm.", "mlp.")


def hybrid_name(name: str) -> str:
    """The HybridModel's name of a GPTModel's parameter.

    >>> hybrid_name("decoder.layers.3.mlp.linear_fc1.weight")
    'decoder.layers.7.mlp.linear_fc1.weight'

    Raises:
        UserError: `name` is no parameter of MiniCPM's layers.
    """
    gpt, hybrid = FINAL_NORM
    if name.startswith(gpt):
        return hybrid + name.removeprefix(gpt)
    if not name.startswith(LAYERS):
        return name
    layer, rest = _split(name)
    return f"{LAYERS}{2 * layer + _block(name, rest)}.{rest}"


def gpt_name(name: str) -> str:
    """The GPTModel's name of a HybridModel's parameter.

    >>> gpt_name("decoder.layers.7.mlp.linear_fc1.weight")
    'decoder.layers.3.mlp.linear_fc1.weight'

    Raises:
        UserError: `name` is no parameter of MiniCPM's layers, or its layer is of the other kind.
    """
    gpt, hybrid = FINAL_NORM
    if name.startswith(hybrid):
        return gpt + name.removeprefix(hybrid)
    if not name.startswith(LAYERS):
        return name
    layer, rest = _split(name)
    if layer % 2 != _block(name, rest):
        raise UserError(f"{name} is not a parameter of a MiniCPM HybridModel", where="parameter names")
    return f"{LAYERS}{layer // 2}.{rest}"


def _split(name: str) -> tuple[int, str]:
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    if not number.isdigit():
        raise UserError(f"{name} names no layer", where="parameter names")
    return int(number), rest


def _block(name: str, rest: str) -> int:
    """0 in the attention block, 1 in the MLP."""
    if rest.startswith(ATTENTION):
        return 0
    if rest.startswith(MLP):
        return 1
    raise UserError(f"{name} is not a parameter of a MiniCPM layer", where="parameter names")
