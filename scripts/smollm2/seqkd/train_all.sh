#!/usr/bin/env bash
# Sequence-level distillation: fine-tunes the 10-block student on answers of checkpoints/SmolLM2-135M-Instruct,
# which tools/generate_data.sh beside this folder makes first.
#   bash scripts/smollm2/seqkd/train_all.sh [--section.key value …]     DRY_RUN=1: only print the commands
set -euo pipefail

types="ce"                                           # cross entropy: there is no divergence to choose
gpus="${GPUS:-1}"                                    # of this machine; fewer are used if fewer are there
seeds="${SEEDS:-10}"                                 # training seeds, one run each: "10 20 30"
CKPT_NAME="${CKPT_NAME:-SmolLM2-10L}"                # the student, a folder under checkpoints/
generated="${GENERATED:-data/generated/SmolLM2-135M-Instruct}"  # the teacher's answers

approach="seqkd"
configs=(base models/smollm2 "objectives/$approach")
# shellcheck source=scripts/lib/train_all.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/train_all.sh"
train_all --data.generated "$generated" "$@"
