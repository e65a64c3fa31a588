#!/usr/bin/env bash
# DistillLens: checkpoints/teacher-gpt2-1.5B teaches gpt2-base or gpt2-medium
# by its final distributions and by the lenses of paired layers.
#   bash scripts/gpt2/distill_lens/train_all.sh [--section.key value …]     DRY_RUN=1: only print the commands
set -euo pipefail

model="${MODEL:-base}"                               # "base" or "medium"
types="${TYPES:-rkl}"                                # one run each: fkl rkl fkl+rkl jsd akl skew_fkl skew_rkl tvd
gpus="${GPUS:-4}"                                    # of this machine; fewer are used if fewer are there
seeds="${SEEDS:-10}"                                 # training seeds, one run each: "10 20 30"
CKPT_NAME="${CKPT_NAME:-gpt2-$model}"                # the student, a folder under checkpoints/

approach="distill_lens"
configs=(base "models/gpt2-$model" "objectives/$approach" "paper/gpt2-$model-$approach")
# shellcheck source=scripts/lib/train_all.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/train_all.sh"
train_all "$@"
