#!/usr/bin/env bash
# A mixture of experts out of a dense model (section 7.3 of the paper): the quickstart's stable checkpoint is upcycled,
# and three decays start at it: the mixture, the dense model with as many tokens, the dense model with as many FLOPs.
# Needs runs/quickstart (`make quickstart`). STEPS is the length of the mixture's decay; minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=${RUN:-runs/quickstart} # a run with a checkpoint in its stable stage
STEP=${STEP:-300}
STEPS=${STEPS:-60}
RANKS=${RANKS:-2}
OUT=${OUT:-runs/upcycle}
step() { printf '\n== %s\n' "$*"; }
train() { # recipe, checkpoint to begin with, name, steps
  local launch=(deepspeed --num_gpus "$RANKS")
  if python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
    launch=(deepspeed --num_accelerators "$RANKS")
  fi
  local run=(
    examples/train.py --recipe "$1" --from "$2" "name=$3" "run.directory=$OUT" schedule.decay="$4"
    schedule.decay_shape=linear schedule.half_life=null evaluation.interval=10 evaluation.batches=8 checkpoint.interval=null
  )
  "${launch[@]}" "${run[@]}"
  python "${run[@]}" --finished # deepspeed ends with 0 when its launcher process is killed, too
}

step "1/5 each MLP becomes 8 copies behind a router, 2 for a token"
[ -e "$OUT/upcycled" ] || python tools/upcycle.py --input "$RUN@$STEP" --output "$OUT/upcycled" --experts 8 --top-k 2

step "2/5 the mixture: $STEPS steps of decay"
train "$OUT/upcycled/recipe.yaml" "$OUT/upcycled@$STEP" moe "$STEPS"

step "3/5 the dense model with as many tokens"
train "$RUN/recipe.yaml" "$RUN@$STEP" dense-equal-tokens "$STEPS"

MORE=$(python tools/compare_runs.py --runs "$RUN" "$OUT/upcycled" --equal-flops "$STEPS")
step "4/5 the dense model with as many FLOPs: $MORE steps"
train "$RUN/recipe.yaml" "$RUN@$STEP" dense-equal-flops "$MORE"

step "5/5 side by side"
python tools/compare_runs.py --runs "$OUT/moe" "$OUT/dense-equal-tokens" "$OUT/dense-equal-flops" \
  --output "$OUT/moe/comparison.png"
