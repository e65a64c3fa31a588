#!/usr/bin/env bash
# Scores the trained students of Qwen2.5-1.5B on the test sets, as configs/eval/paper.yaml says.
#   bash scripts/qwen2.5/eval/run_eval.sh [--section.key value …]     DRY_RUN=1: only print the commands
set -euo pipefail

approaches="${APPROACHES:-sft seqkd kd distill_lens}" # those of them that are trained
types="${TYPES:-fkl rkl fkl+rkl jsd akl}"            # those of them that are trained
sets="${SETS:-dolly self_inst vicuna sinst uinst}"   # those of them that are under data/
seeds="${SEEDS:-10 20 30 40 50}"                     # sampling seeds
gpus="${GPUS:-4}"                                    # of this machine; fewer are used if fewer are there
also="${ALSO:-}"                                     # more folders of checkpoints/ to score: "Qwen2.5-3B"
CKPT_NAME="${CKPT_NAME:-Qwen2.5-1.5B}"               # the student, a folder under checkpoints/

protocol="paper"
# shellcheck source=scripts/lib/run_eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/run_eval.sh"
evaluate_all "$@"
