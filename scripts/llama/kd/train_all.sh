#!/usr/bin/env bash
# checkpoints/SFT-Llama-7B teaches TinyLlama-1.1B
# by its final distributions.
#   bash scripts/llama/kd/train_all.sh [--section.key value …]     DRY_RUN=1: only print the commands
set -euo pipefail

types="${TYPES:-fkl rkl fkl+rkl jsd akl}"            # one run each: fkl rkl fkl+rkl jsd akl skew_fkl skew_rkl tvd
gpus="${GPUS:-4}"                                    # of this machine; fewer are used if fewer are there
seeds="${SEEDS:-10}"                                 # training seeds, one run each: "10 20 30"
CKPT_NAME="${CKPT_NAME:-TinyLlama-1.1B}"             # the student, a folder under checkpoints/

approach="kd"
configs=(base models/tinyllama "objectives/$approach" "paper/tinyllama-$approach")
# shellcheck source=scripts/lib/train_all.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/train_all.sh"
train_all "$@"
