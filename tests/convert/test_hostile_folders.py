"""Published folders with any damage: each is opened, or refused with one line that names a file in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minicpm_megatron.convert import open_source
from minicpm_megatron.convert.formats import FORMATS
from minicpm_megatron.convert.operation import convert
from minicpm_megatron.convert.source import Source
from minicpm_megatron.convert.tokenizer_folder import open_tokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sharded import write_single
from tests.convert.conftest import EXPERTS, random_tensors, small_model
from tests.hostile import EDITS, EXAMPLES, Changed, Edit, check_line, damaged

SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "kv_channels": 8}
NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 10**6, 10**30, 10**400, 0.0, 0.5, 1e308, 5e-324])
ODD = st.sampled_from([float("nan"), float("inf"), -float("inf"), "", "silu", "dynamic", [], {}, [[]], {"a": [None]}])
VALUES = (
    NUMBERS
    | ODD
    | st.none()
    | st.booleans()
    | st.lists(NUMBERS, max_size=3)
    | st.fixed_dictionaries(
        {}, optional={key: NUMBERS | ODD for key in ("type", "rope_type", "factor", "rope_theta", "scale_emb")}
    )
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    """A sound folder of every format, with two shards, settings and a tokenizer."""
    root, made = tmp_path_factory.mktemp("folders"), {}
    for name, layout in FORMATS.items():
        model = small_model(**SMALL, **({} if layout.rows else EXPERTS))
        write_single(root / f"{name}-ours", random_tensors(model).items(), model.model_dump(mode="json"), {"step": 0})
        made[name] = root / name
        convert(root / f"{name}-ours", made[name], name, tokenizer=tokenizer, max_shard_size="60KB")
        open_source(made[name])
    return made


def read_all(folder: Path) -> Source:
    """Everything that an import reads."""
    source = open_source(folder)
    for name in source.tensors.names():
        source.tensors.read(name)
    return source


def refused_in_one_line(folder: Path) -> Source | None:
    """The model, or None where it is refused as it should be."""
    try:
        return read_all(folder)
    except UserError as error:
        check_line(error, folder)
        return None


CONFIG_KEYS = sorted(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
        *("rms_norm_eps", "initializer_range", "tie_word_embeddings", "hidden_act", "attention_bias", "architectures"),
        *("scale_emb", "scale_depth", "dim_model_base", "embedding_multiplier", "residual_multiplier", "model_type"),
        *("logits_scaling", "attention_multiplier", "num_experts", "num_local_experts", "num_experts_per_tok"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "minicpm_megatron", "sliding_window", "sparse_config"),
        *("layer_types", "quantization_config", "mup_denominator", "norm_topk_prob", "auto_map"),
    }
)


@pytest.mark.parametrize("name", FORMATS)
def test_any_value_of_any_key_of_the_configuration(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name]

    @EXAMPLES
    @given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES, min_size=1, max_size=3))
    def check(changes: dict[str, Any]) -> None:
        with Changed(folder / "config.json") as path:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
            refused_in_one_line(folder)

    check()


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "model.safetensors.index.json", "first shard"]
)
def test_any_damage_of_any_file(file: str, folders: dict[str, Path]) -> None:
    folder = folders["granite"]
    file = sorted(path.name for path in folder.glob("*.safetensors"))[0] if file == "first shard" else file

    @EXAMPLES
    @given(edit=EDITS)
    def check(edit: Edit) -> None:
        with Changed(folder / file) as path:
            path.write_bytes(damaged(path.read_bytes(), edit))
            refused_in_one_line(folder)

    check()


def test_any_damage_of_pickled_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "llama")
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors*"):
        weights |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with open(folder / "pytorch_model.bin", "rb") as file:
        pickle_length = file.read().index(b"PK\x07\x08")

    @EXAMPLES
    @given(edit=EDITS, head=st.booleans())
    def check(edit: Edit, head: bool) -> None:
        with Changed(folder / "pytorch_model.bin") as path:
            # half of them in the pickle, which is a thousandth of the file
            place = edit[0] % pickle_length if head else edit[0]
            path.write_bytes(damaged(path.read_bytes(), (place, *edit[1:])))
            refused_in_one_line(folder)

    check()


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_any_damage_of_a_tokenizer(file: str, folders: dict[str, Path]) -> None:
    folder = folders["minicpm"]

    @EXAMPLES
    @given(edit=EDITS)
    def check(edit: Edit) -> None:
        with Changed(folder / file) as path:
            path.write_bytes(damaged(path.read_bytes(), edit))
            try:
                open_tokenizer(folder, to_publish=True)
            except UserError as error:
                check_line(error, folder)

    check()


def test_any_model_of_a_manifest(tmp_path: Path) -> None:
    """The checksums are right, since whoever forges a manifest writes those, too."""
    model = small_model(**SMALL)
    fields, tensors = model.model_dump(mode="json"), random_tensors(model)

    @EXAMPLES
    @given(
        changes=VALUES | st.dictionaries(st.sampled_from(sorted(fields)), VALUES, min_size=1, max_size=2), text=VALUES
    )
    def check(changes: Any, text: Any) -> None:
        folder = tmp_path / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        forged = fields | changes if isinstance(changes, dict) else changes
        write_single(folder, tensors.items(), forged, {"step": 0, "tokens": 0, "text": text, "data": changes})
        refused_in_one_line(folder)

    check()
