#!/usr/bin/env bash
# Any script of this project, or train.py itself, on the machines of a hostfile by DeepSpeed's launcher. Started on one of them,
# which reaches the others by ssh without a password, and by pdsh:
#   HOSTFILE=configs/hostfiles/two_nodes_8gpus bash scripts/launch/deepspeed.sh scripts/gpt2/distill_lens/train_all.sh [--flags]
# Without ssh, started on each:   NODE_RANK=0 MASTER_ADDR=HOST HOSTFILE=… bash scripts/launch/deepspeed.sh …
set -euo pipefail

HOSTFILE="${HOSTFILE:-configs/hostfiles/one_node_4gpus}"   # a line for each machine: NAME slots=GPUS
MASTER_ADDR="${MASTER_ADDR:-}"                             # of the first of them; empty: what it says by ssh
MASTER_PORT="${MASTER_PORT:-29500}"                        # free there, and the next one for each further run of a script
NODE_RANK="${NODE_RANK:-}"                                 # only without ssh: 0 on the first machine, 1 …

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ ! -f "$HOSTFILE" ]]; then
  echo "error: there is no hostfile $HOSTFILE, only: $(ls -m configs/hostfiles)" >&2
  exit 2
fi
if (($(grep -c '^[^#[:space:]]' "$HOSTFILE") == 1)); then # one machine: no ssh to itself
  NODE_RANK=0 MASTER_ADDR=127.0.0.1
fi
if [[ -z "$NODE_RANK" && "${DRY_RUN:-0}" != 1 ]] && ! command -v pdsh >/dev/null; then
  echo "error: DeepSpeed reaches other machines by pdsh, which is not here; install it, or say NODE_RANK= on each" >&2
  exit 2
fi
if [[ -n "$NODE_RANK" && -z "$MASTER_ADDR" ]]; then
  echo "error: without ssh, say where the first machine is: MASTER_ADDR=HOST in front" >&2
  exit 2
fi
export HOSTFILE MASTER_ADDR MASTER_PORT NODE_RANK
# shellcheck source=scripts/lib/launch.sh
source scripts/lib/launch.sh
processes=$(slots) && processes="${processes%%$'\n'*}" # slots= decides, not gpus=
export PROCESSES="$processes"
start_script "$@"
