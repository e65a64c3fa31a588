#!/usr/bin/env bash
# Sequence-level distillation: fine-tunes gpt2-base or gpt2-medium on answers of checkpoints/teacher-gpt2-1.5B,
# which tools/generate_data.sh beside this folder makes first.
#   bash scripts/gpt2/seqkd/train_all.sh [--section.key value …]     DRY_RUN=1: only print the commands
set -euo pipefail

model="${MODEL:-base}"                               # "base" or "medium"
types="ce"                                           # cross entropy: there is no divergence to choose
gpus="${GPUS:-4}"                                    # of this machine; fewer are used if fewer are there
seeds="${SEEDS:-10}"                                 # training seeds, one run each: "10 20 30"
CKPT_NAME="${CKPT_NAME:-gpt2-$model}"                # the student, a folder under checkpoints/
generated="${GENERATED:-data/generated/teacher-gpt2-1.5B}"  # the teacher's answers

approach="seqkd"
configs=(base "models/gpt2-$model" "objectives/$approach" "paper/gpt2-$model-$approach")
# shellcheck source=scripts/lib/train_all.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/train_all.sh"
train_all --data.generated "$generated" "$@"
