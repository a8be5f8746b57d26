#!/usr/bin/env bash
# A small model trained on 256 tokens and extended to 1,024 and to 4,096 (section 7.2 of the paper): adjusted base
# frequency, then NTK-aware scaling with a curriculum, 44 % long data, batch in tokens constant, head untied in between.
# Then what each stage makes of texts of up to 4,096 tokens: the pass key it finds, and its loss by position.
# Two CPU cores take about 35 minutes. What is there is kept: interrupted and started again, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=runs/extension
CORPUS=${CORPUS:-runs/quickstart/corpus}
RANKS=${RANKS:-2}
FIRST=${FIRST:-4500} # steps of the three stages; the first is that of the recipe's schedule
SECOND=${SECOND:-800}
THIRD=${THIRD:-500}
step() { printf '\n== %s\n' "$*"; }
train() { # arguments of examples/train.py
  local launch=(deepspeed --num_gpus "$RANKS")
  if python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
    launch=(deepspeed --num_accelerators "$RANKS")
  fi
  "${launch[@]}" examples/train.py --recipe examples/recipes/extension.yaml "$@"
  # deepspeed ends with 0 when its launcher process is killed, too
  python examples/train.py --recipe examples/recipes/extension.yaml "$@" --finished
}
tokens() { # text, prefix
  [ -e "$OUT/data/$2.json" ] || python tools/preprocess_data.py --input "$1" --tokenizer $OUT/tokenizer \
    --output-prefix "$OUT/data/$2" --workers 2
}
questions() { # name, lengths, documents to train on of each length and depth; well below the context, or samples cut most
  python tools/build_retrieval_set.py --task passkey --corpus "$CORPUS/en.jsonl" --tokenizer $OUT/tokenizer \
    --lengths "$2" --output "$OUT/sets/$1" --samples 1 --train-prefix "$OUT/data/$1" --train-samples "$3"
  tokens "$OUT/data/$1.jsonl" "$1"
}
mix() { # long data at 44 %, pass keys and code; short data at 56 %, pass keys and English
  printf 'data.train=[{prefix: %s, weight: 34}, {prefix: %s, weight: 10}, {prefix: %s, weight: 36}, {prefix: %s, weight: 20}]' \
    "$OUT/data/$1" $OUT/data/code $OUT/data/passkey-256 $OUT/data/en
}

step "1/6 text, a tokenizer of 2,048 pieces, tokens, pass keys to train on"
[ -e "$CORPUS/manifest.json" ] || python tools/build_sample_corpus.py --output "$CORPUS"
[ -e $OUT/tokenizer/tokenizer.json ] || python tools/train_tokenizer.py --input "$CORPUS/en.jsonl" "$CORPUS/code.jsonl" \
  --vocab-size 2048 --output $OUT/tokenizer
mkdir -p $OUT/data
for name in en code code.valid; do tokens "$CORPUS/$name.jsonl" $name; done
questions passkey-256 75,80,85,90,100,110,125,140,160,185,215 800
questions passkey-1024 250,320,400,500,630,800,900 100
questions passkey-4096 1000,1300,1700,2200,2800,3500 25
python tools/build_retrieval_set.py --task passkey --corpus "$CORPUS/en.jsonl" --tokenizer $OUT/tokenizer \
  --lengths 200,800,1600,3200 --samples 10 --seed 1 --output $OUT/sets/asked

step "2/6 256 tokens: $FIRST steps"
train name=context-256 schedule.total="$FIRST"

step "3/6 the head becomes a tensor of its own"
[ -e $OUT/untied ] || python tools/convert_checkpoint.py --input $OUT/context-256 --to megatron --untie --output $OUT/untied

step "4/6 1,024 tokens: $SECOND steps with an adjusted base frequency"
train --init-from "$OUT/untied@latest" name=context-1024 model.untie_embeddings_and_output_weights=true \
  model.rotary_base=100000 data.sequence_length=1024 training.global_batch_size=4 training.micro_batch_size=2 \
  schedule.warmup=0 schedule.total="$SECOND" "$(mix passkey-1024)"

step "5/6 4,096 tokens: $THIRD steps with NTK-aware scaling, rows of 2,048 first, and the decay"
train --init-from "$OUT/context-1024@latest" name=context-4096 model.untie_embeddings_and_output_weights=true \
  model.rotary_base=100000 model.rope_scaling.type=ntk model.rope_scaling.factor=4 \
  model.rope_scaling.original_max_position_embeddings=1024 data.sequence_length=4096 \
  "data.curriculum=[{sequence_length: 2048, until: $((THIRD / 4))}]" training.global_batch_size=1 \
  training.micro_batch_size=1 parallel.context_parallel_size="$RANKS" parallel.cp_comm_type=a2a schedule.warmup=0 \
  schedule.total="$THIRD" schedule.decay=$((THIRD / 2)) schedule.decay_shape=linear "$(mix passkey-4096)"

step "6/6 before and after"
for context in 256 1024 4096; do
  python tools/evaluate_retrieval.py --checkpoint $OUT/context-$context --set $OUT/sets/asked \
    --output $OUT/context-$context/passkey
done
python tools/evaluate_positions.py --checkpoint $OUT/context-256 $OUT/context-1024 $OUT/context-4096 \
  --data $OUT/data/code.valid --length 4096 --output $OUT/positions
