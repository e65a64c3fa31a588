#!/usr/bin/env bash
# Sequence-level distillation: fine-tunes an adapter of Qwen2.5-1.5B on answers of checkpoints/Qwen2.5-3B,
# which tools/generate_data.sh beside this folder makes first.
#   bash scripts/qwen2.5/seqkd/train_all.sh [--section.key value …]     DRY_RUN=1: only print the commands
set -euo pipefail

types="ce"                                           # cross entropy: there is no divergence to choose
gpus="${GPUS:-4}"                                    # of this machine; fewer are used if fewer are there
seeds="${SEEDS:-10}"                                 # training seeds, one run each: "10 20 30"
CKPT_NAME="${CKPT_NAME:-Qwen2.5-1.5B}"               # the student, a folder under checkpoints/
generated="${GENERATED:-data/generated/Qwen2.5-3B}"  # the teacher's answers

approach="seqkd"
configs=(base models/qwen2.5-1.5b "objectives/$approach" "paper/qwen2.5-1.5b-$approach")
# shellcheck source=scripts/lib/train_all.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/train_all.sh"
train_all --data.generated "$generated" "$@"
