#!/usr/bin/env bash
# MiniCPM-2.4B on Megatron-LM's own trainer: examples/recipes/minicpm-2.4b.yaml as Megatron-LM's arguments.
# GPUS is the number of GPUs of this machine; further arguments are passed on and win over those here, e.g.
#   bash examples/megatron_lm/pretrain_minicpm.sh --tensor-model-parallel-size 2 --sequence-parallel
set -euo pipefail
cd "$(dirname "$0")/../.."

GPUS=${GPUS:-8}
DATA=${DATA:-data/stable}       # PREFIX.bin and PREFIX.idx of tools/preprocess_data.py are Megatron-LM's format
TOKENIZER=${TOKENIZER:-data/tokenizer}
RUN=${RUN:-runs/megatron-lm}

source examples/gpu_environment.sh # CUDA_DEVICE_MAX_CONNECTIONS=1, without which Megatron-LM refuses tensor parallelism

MODEL=(--minicpm-preset minicpm-2.4b --seq-length 4096)
TRAINING=(
  --micro-batch-size 4 --global-batch-size 960 --train-iters 279700 --bf16 --seed 1234
  --recompute-granularity selective --recompute-modules core_attn
)
OPTIMIZER=(--lr 0.01 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --clip-grad 1.0)
SCHEDULE=(
  --lr-decay-style WSD --lr-warmup-iters 2000 --lr-wsd-decay-iters 25400
  --wsd-decay-shape exponential --wsd-half-life-iters 5000
)
SHARDING=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
# the first needs NVIDIA's apex, the second Transformer Engine; neither is needed here
FUSIONS=(--no-gradient-accumulation-fusion --no-rope-fusion)
FILES=(
  --data-path "$DATA" --split 999,1,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
  --save "$RUN" --load "$RUN" --save-interval 1000 --eval-interval 1000 --eval-iters 4
  --log-interval 10 --tensorboard-dir "$RUN/tensorboard"
)

torchrun --standalone --nproc-per-node "$GPUS" examples/megatron_lm/pretrain_minicpm.py \
  "${MODEL[@]}" "${TRAINING[@]}" "${OPTIMIZER[@]}" "${SCHEDULE[@]}" "${SHARDING[@]}" "${FUSIONS[@]}" "${FILES[@]}" "$@"
