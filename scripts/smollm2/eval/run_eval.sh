#!/usr/bin/env bash
# Scores the trained students of SmolLM2-10L on the test sets, as configs/eval/paper.yaml says.
#   bash scripts/smollm2/eval/run_eval.sh [--section.key value …]     DRY_RUN=1: only print the commands
# That is hours on a CPU. A first look in minutes, not comparable to it: --config configs/eval/quick.yaml
set -euo pipefail

approaches="${APPROACHES:-sft seqkd kd distill_lens}" # those of them that are trained
types="${TYPES:-fkl rkl fkl+rkl jsd akl}"            # those of them that are trained
sets="${SETS:-dolly self_inst vicuna sinst uinst}"   # those of them that are under data/
seeds="${SEEDS:-10 20 30 40 50}"                     # sampling seeds
gpus="${GPUS:-1}"                                    # of this machine; fewer are used if fewer are there
also="${ALSO:-}"                                     # more folders of checkpoints/ to score: "SmolLM2-135M-Instruct"
CKPT_NAME="${CKPT_NAME:-SmolLM2-10L}"                # the student, a folder under checkpoints/

protocol="paper"
# shellcheck source=scripts/lib/run_eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/run_eval.sh"
evaluate_all "$@"
