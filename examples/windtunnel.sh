#!/usr/bin/env bash
# Every experiment of sections 3 and 4 of the paper on models of 0.02M to 6M parameters, unattended, with one report at the end.
#   bash examples/windtunnel.sh          about an hour and a half on two CPU cores (measured: 83 minutes)
#   bash examples/windtunnel.sh smoke    minutes: every command once, findings of no worth
#   bash examples/windtunnel.sh muon     Muon beside AdamW, 228 runs; benchmarks/optimizer_steps.py reads them
# What is there is kept: interrupted and started again, it goes on. WORKERS runs are at once (default: one a core).
set -euo pipefail
cd "$(dirname "$0")/.."

PLAN=${1:-cpu}
CORPUS=${CORPUS:-runs/quickstart/corpus}
OUT=runs/windtunnel
WORKERS=${WORKERS:-$(nproc)}
step() { printf '\n== %s\n' "$*"; }

step "1/2 text, a tokenizer of 1,024 pieces, tokens"
[ -e "$CORPUS/manifest.json" ] || python tools/build_sample_corpus.py --output "$CORPUS"
[ -e $OUT/tokenizer/tokenizer.json ] || python tools/train_tokenizer.py --input "$CORPUS/en.jsonl" "$CORPUS/code.jsonl" \
  --vocab-size 1024 --output $OUT/tokenizer
mkdir -p $OUT/data
for name in en code en.valid code.valid; do
  [ -e "$OUT/data/$name.json" ] || python tools/preprocess_data.py --input "$CORPUS/$name.jsonl" --tokenizer $OUT/tokenizer \
    --output-prefix "$OUT/data/$name" --workers 2
done

step "2/2 the experiments of examples/windtunnel/$PLAN.yaml"
python tools/windtunnel.py all --plan "examples/windtunnel/$PLAN.yaml" --output "$OUT/$PLAN" --workers "$WORKERS"
