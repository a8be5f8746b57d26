#!/usr/bin/env bash
# The whole path on one machine, CPU or GPU: corpus -> tokenizer -> tokens -> distributed training -> Hugging Face
# export -> generated text. Each line is a command of the project that can be run by itself; what is already there is
# kept, so that an interrupted quickstart goes on where it was. `make quickstart` runs it inside the environment.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=runs/quickstart
RANKS=${RANKS:-2}
RECIPE=examples/recipes/quickstart.yaml
step() { printf '\n== %s\n' "$*"; }

step "1/6 a real corpus in English, Chinese and code, from what is installed here"
[ -e $RUN/corpus/manifest.json ] || python tools/build_sample_corpus.py --output $RUN/corpus

step "2/6 a tokenizer: sentencepiece BPE with byte fallback"
[ -e $RUN/tokenizer/tokenizer.json ] || python tools/train_tokenizer.py \
  --input $RUN/corpus/en.jsonl $RUN/corpus/zh.jsonl $RUN/corpus/code.jsonl --vocab-size 8192 --output $RUN/tokenizer

step "3/6 tokens in Megatron's .bin/.idx"
mkdir -p $RUN/data
for language in en zh code; do
  for part in train valid; do
    text=$RUN/corpus/$language.jsonl
    [ $part = train ] || text=$RUN/corpus/$language.valid.jsonl
    [ -e $RUN/data/$part-$language.json ] || python tools/preprocess_data.py \
      --input $text --tokenizer $RUN/tokenizer --output-prefix $RUN/data/$part-$language --workers 2
  done
done

step "4/6 training under the deepspeed launcher: $RANKS processes, ZeRO 1, WSD schedule"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  # as many GPUs as divide the 16 samples of a step
  GPUS=$(python -c 'import math, torch; print(math.gcd(16, 2 ** int(math.log2(torch.cuda.device_count()))))')
  deepspeed --num_gpus "$GPUS" examples/train.py --recipe $RECIPE
else
  DS_ACCELERATOR=cpu deepspeed --num_accelerators "$RANKS" examples/train.py --recipe $RECIPE
fi
python examples/train.py --recipe $RECIPE --finished # deepspeed ends with 0 when its launcher process is killed, too

step "5/6 export to Hugging Face (Llama layout: any Llama runtime loads it)"
python tools/convert_checkpoint.py --input $RUN --to llama --output $RUN/hf-llama --overwrite

step "6/6 generated text, by stock transformers"
for prompt in "The method" "子曰：“" "def __init__(self"; do
  python tools/generate.py --checkpoint $RUN/hf-llama --prompt "$prompt" --max-new-tokens 48 --temperature 0.5 --seed 1
done

cat <<MESSAGE

== made, in $RUN
  corpus/ tokenizer/ data/     text, sentencepiece tokenizer, Megatron tokens
  checkpoints/                 resumable training state (safetensors and a manifest with checksums)
  loss.png metrics.jsonl       the loss curve, and every step as a line of JSON
  hf-llama/                    AutoModelForCausalLM.from_pretrained("$RUN/hf-llama")

== try next
  source .venv/bin/activate    (once a shell; the lines below want it)
  tensorboard --logdir $RUN
  deepspeed --num_accelerators $RANKS examples/train.py --recipe $RECIPE name=tp2 parallel.tensor_model_parallel_size=2
  deepspeed --num_accelerators $RANKS examples/train.py --recipe $RECIPE --from quickstart@300 name=short-decay schedule.decay=40 schedule.half_life=8
  python examples/train.py --recipe $RECIPE optimizer.lr=0.02 --dry-run
  python tools/plan.py --recipe examples/recipes/minicpm-2.4b.yaml --gpu h100 --gpus 64
  python tools/generate.py --checkpoint $RUN --prompt "import os"
MESSAGE
