#!/usr/bin/env bash
# Any script of this project, or train.py itself, on several machines by torchrun. Started on each of them:
#   NODE_RANK=0 MASTER_ADDR=HOST bash scripts/launch/torchrun.sh scripts/gpt2/distill_lens/train_all.sh [--section.key value …]
#   NODE_RANK=1 MASTER_ADDR=HOST bash scripts/launch/torchrun.sh … the same …            DRY_RUN=1: only print the commands
set -euo pipefail

NNODES="${NNODES:-2}"                                # how many machines
NODE_RANK="${NODE_RANK:-}"                           # 0 on the first, whose screen and exit code tell of the run, 1 …
MASTER_ADDR="${MASTER_ADDR:-}"                       # the first machine's name or address, as the others reach it
MASTER_PORT="${MASTER_PORT:-29500}"                  # free there, and the next one for each further run of a script
GPUS="${GPUS:-4}"                                    # of each machine; fewer are used if fewer are there

if [[ -z "$NODE_RANK" || -z "$MASTER_ADDR" ]]; then
  echo "error: say on each machine which it is and where the first one is: NODE_RANK=0 MASTER_ADDR=HOST in front" >&2
  exit 2
fi
unset HOSTFILE
export NNODES NODE_RANK MASTER_ADDR MASTER_PORT GPUS
gpus="$GPUS"
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/launch.sh"
start_script "$@"
