"""Megatron-Core and Megatron-LM as they save and load torch_dist checkpoints, on ranks without CUDA.

The worker runs inside `tests.distributed.forked`; this module imports what is slow to import, so that forks need not.
Megatron's own code does all the saving and loading: `MiniCPMModel` and plain torch give it weights to save.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.training import checkpointing, global_vars
from megatron.training.arguments import parse_and_validate_args
from safetensors.torch import save_file

from minicpm_megatron import MiniCPMConfig, MiniCPMModel
from minicpm_megatron.megatron_lm import add_minicpm_args
from minicpm_megatron.model.hybrid import MiniCPMHybridModel
from minicpm_megatron.model.layer_spec import get_minicpm_block_spec
from minicpm_megatron.model.sharding import named_shards
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import ModelRecipe, ParallelRecipe
from tests.convert.conftest import random_tensors, small_model
from tests.convert.megatron_cases import (
    BETAS,
    ITERATION,
    LEARNING_RATE,
    LENGTH,
    PADDING,
    SAMPLES_A_STEP,
    SEED,
    UPDATES,
    WEIGHT_DECAY,
)


def worker(rank: int, case: dict[str, Any]) -> Any:
    """Do what `case["do"]` says: save, load, train (and save), or save and load with Megatron-LM's own functions.

    Args:
        case: "folder", "model" (fields for `small_model`), "tp", "pp", "ep", "metadata" of sharded state dicts; of a
            save "stock" (Megatron-Core's own layers), "hybrid" and "checksums"; of a load "plain" (GPTModel with our
            layers), "tokens" and "logits" (a file); of training "precision", "distributed" (optimizer) and "lm" (saved
            by Megatron-LM); of Megatron-LM "plugin", its arguments with those of `minicpm_megatron.megatron_lm`.
    """
    parallel = ParallelRecipe(
        tensor_model_parallel_size=case.get("tp", 1),
        pipeline_model_parallel_size=case.get("pp", 1),
        expert_model_parallel_size=case.get("ep", 1),
    )
    _start(parallel)
    tasks = {"save": _save, "load": _load, "train": _train, "lm_save": _lm_save, "lm_load": _lm_load}
    return tasks[case["do"]](case, small_model(**case["model"]), parallel)


def _start(parallel: ParallelRecipe) -> None:
    device.prepare()
    # what Megatron 0.19 asks of CUDA while it saves, loads and takes optimizer steps
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.get_rng_state = lambda *_: torch.zeros(4, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    for name in ("tensor", "zeros", "empty"):
        setattr(torch, name, _without_cuda(getattr(torch, name)))
    names = torch.Tensor.type
    torch.Tensor.type = lambda self, *a, **k: (  # type: ignore[method-assign,assignment]
        names(self, *a, **k) if a or k else names(self).replace("torch.", "torch.cuda.")
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        create_gloo_process_groups=True,
    )


def _without_cuda(make: Any) -> Any:
    def made(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if str(keywords.get("device")).startswith("cuda"):
            keywords["device"] = "cpu"
        return make(*arguments, **keywords)

    return made


def _config(recipe: ModelRecipe, parallel: ParallelRecipe, precision: Any = "fp32") -> MiniCPMConfig:
    return MiniCPMConfig.from_recipe(recipe, parallel, precision=precision)


@torch.no_grad()
def _fill(model: torch.nn.Module, config: MiniCPMConfig, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter, spec in named_shards(model, config):
        parameter.copy_(spec.take(tensors[name], tuple(parameter.shape)))
        if spec.shape != tuple(parameter.shape):
            parameter[spec.shape[0] :] = PADDING


def _metadata(case: dict[str, Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"singleton_local_shards": False, "dp_cp_group": group} | case.get("metadata", {})


def _write(case: dict[str, Any], state: dict[str, Any]) -> None:
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    checksums = case.get("checksums", False)
    dist_checkpointing.save(state, str(folder), content_metadata=_metadata(case), verify_integrity=checksums)


def _save(case: dict[str, Any], recipe: ModelRecipe, parallel: ParallelRecipe) -> None:
    config = _config(recipe, parallel)
    model: Any = _plain(config, stock=True) if case.get("stock") else _ours(config, hybrid=case.get("hybrid", False))
    _fill(model, config, random_tensors(recipe, SEED))
    state = {"model": model.sharded_state_dict(metadata=_metadata(case)), "iteration": ITERATION}
    _write(case, state | {"checkpoint_version": 3.0})


def _load(case: dict[str, Any], recipe: ModelRecipe, parallel: ParallelRecipe) -> Any:
    """Names of parameters that are not `random_tensors` with zeros as padding; logits into a file, where asked."""
    config = _config(recipe, parallel)
    model: Any = _plain(config) if case.get("plain") else _ours(config)
    _fill(model, config, random_tensors(recipe, seed=99))
    wanted = {"model": model.sharded_state_dict(metadata=_metadata(case))}
    loaded = dist_checkpointing.load(wanted, case["folder"], strict="raise_all")
    model.load_state_dict(loaded["model"])
    if "logits" in case:
        tokens = torch.tensor([case["tokens"]])
        with torch.no_grad():
            logits = model.eval()(tokens, torch.arange(tokens.shape[1])[None], None)
        save_file({"logits": logits[0, :, : recipe.vocab_size].contiguous()}, case["logits"])
    return _wrong(model, config, random_tensors(recipe, SEED))


def _ours(config: MiniCPMConfig, *, hybrid: bool = False) -> MiniCPMModel | MiniCPMHybridModel:
    """This pipeline stage's part."""
    return (MiniCPMHybridModel if hybrid else MiniCPMModel)(
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _plain(config: MiniCPMConfig, *, stock: bool = False) -> GPTModel:
    stock_layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    return GPTModel(
        config,
        stock_layer if stock else get_minicpm_block_spec(config),
        vocab_size=config.padded_vocab_size(),
        max_sequence_length=config.max_position_embeddings,
        share_embeddings_and_output_weights=not config.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=int(config.rotary_base),
    )


def _wrong(model: torch.nn.Module, config: MiniCPMConfig, expected: dict[str, torch.Tensor]) -> list[str]:
    shards = list(named_shards(model, config))
    assert shards
    return [n for n, p, spec in shards if not torch.equal(p, spec.take(expected[n], tuple(p.shape)).to(p.dtype))]


def _train(case: dict[str, Any], recipe: ModelRecipe, parallel: ParallelRecipe) -> None:
    """Two AdamW updates by Megatron-Core's own optimizer, with gradients that are `random_tensors` too."""
    precision, distributed = case["precision"], case.get("distributed", False)
    config = _config(recipe, parallel, precision)
    model = MiniCPMModel(config)
    _fill(model, config, random_tensors(recipe, SEED))
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=LEARNING_RATE,
            min_lr=0.0,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            clip_grad=0.0,
            bf16=precision == "bf16",
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed,
        ),
        [wrapped],
    )
    for step in range(UPDATES):
        gradients = random_tensors(recipe, seed=100 + step)
        optimizer.zero_grad()
        for name, parameter, spec in named_shards(model, config):
            parameter.main_grad.copy_(spec.take(gradients[name], tuple(parameter.shape)))
        assert optimizer.step()[0]
    if case.get("lm"):
        _lm_write(case, recipe, wrapped, optimizer)
        return
    metadata = _metadata(case)
    state = {"model": model.sharded_state_dict(metadata=metadata), "iteration": ITERATION, "checkpoint_version": 3.0}
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
    _write(case, state)


def _arguments(case: dict[str, Any], recipe: ModelRecipe) -> Any:
    """Megatron-LM's arguments for this model, as its own parser and checks make them."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    flags = "swiglu disable-bias-linear group-query-attention use-cpu-initialization no-gradient-accumulation-fusion"
    flags += " no-masked-softmax-fusion no-rope-fusion no-bias-swiglu-fusion exit-on-missing-checkpoint"
    values = {
        "num-layers": recipe.num_layers,
        "hidden-size": recipe.hidden_size,
        "ffn-hidden-size": recipe.ffn_hidden_size,
        "num-attention-heads": recipe.num_attention_heads,
        "num-query-groups": recipe.num_query_groups,
        "kv-channels": recipe.kv_channels,
        "max-position-embeddings": recipe.max_position_embeddings,
        "vocab-size": recipe.vocab_size,
        "seq-length": LENGTH,
        "micro-batch-size": 1,
        "global-batch-size": SAMPLES_A_STEP,
        "train-iters": 20,
        "lr": LEARNING_RATE,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "tokenizer-type": "NullTokenizer",
        "transformer-impl": "local",
        "ckpt-format": "torch_dist",
        "tensor-model-parallel-size": case.get("tp", 1),
        "save-interval": 1,
        "load" if case["do"] == "lm_load" else "save": case["folder"],
    }
    if case.get("plugin"):
        values["dim-model-base"] = recipe.dim_model_base
    command = [*(f"--{flag}" for flag in flags.split()), *(f"--{name}={value}" for name, value in values.items())]
    with patch.object(sys, "argv", ["pretrain_gpt.py", *command]):
        arguments = parse_and_validate_args(extra_args_provider=add_minicpm_args if case.get("plugin") else None)
    global_vars.set_args(arguments)
    return arguments


def _lm_save(case: dict[str, Any], recipe: ModelRecipe, parallel: ParallelRecipe) -> None:
    config = _config(recipe, parallel)
    model = MiniCPMModel(config)
    _fill(model, config, random_tensors(recipe, SEED))
    _lm_write(case, recipe, model)


def _lm_write(case: dict[str, Any], recipe: ModelRecipe, model: torch.nn.Module, optimizer: Any = None) -> None:
    arguments = _arguments(case, recipe)
    arguments.consumed_train_samples = SAMPLES_A_STEP * ITERATION
    checkpointing.save_checkpoint(ITERATION, [model], optimizer, None, 0)


def _lm_load(case: dict[str, Any], recipe: ModelRecipe, parallel: ParallelRecipe) -> Any:
    config = _config(recipe, parallel)
    model = MiniCPMModel(config)
    _fill(model, config, random_tensors(recipe, seed=99))
    arguments = _arguments(case, recipe)
    iteration, _ = checkpointing.load_checkpoint([model], None, None)
    return {
        "iteration": iteration,
        "samples": arguments.consumed_train_samples,
        "wrong": _wrong(model, config, random_tensors(recipe, SEED)),
    }
