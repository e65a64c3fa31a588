#!/usr/bin/env bash
# DistillLens: checkpoints/SmolLM2-135M-Instruct teaches the 10-block student of prepare.sh
# by its final distributions and by the lenses of paired layers.
#   bash scripts/smollm2/distill_lens/train_all.sh [--section.key value …]     DRY_RUN=1: only print the commands
set -euo pipefail

types="${TYPES:-fkl}"                                # one run each: fkl rkl fkl+rkl jsd akl skew_fkl skew_rkl tvd
gpus="${GPUS:-1}"                                    # of this machine; fewer are used if fewer are there
seeds="${SEEDS:-10}"                                 # training seeds, one run each: "10 20 30"
CKPT_NAME="${CKPT_NAME:-SmolLM2-10L}"                # the student, a folder under checkpoints/

approach="distill_lens"
configs=(base models/smollm2 "objectives/$approach")
# shellcheck source=scripts/lib/train_all.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/train_all.sh"
train_all "$@"
