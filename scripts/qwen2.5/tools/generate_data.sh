#!/usr/bin/env bash
# checkpoints/Qwen2.5-3B answers the training prompts of Dolly, for seqkd/train_all.sh.
#   bash scripts/qwen2.5/tools/generate_data.sh [--section.key value …]     DRY_RUN=1: only print the command
set -euo pipefail

gpus="${GPUS:-4}"                                    # of this machine; fewer are used if fewer are there
seed="${SEED:-10}"                                   # sampling seed
generated="${GENERATED:-data/generated/Qwen2.5-3B}"  # folder of the answers

# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/launch.sh"
launch_generate --config configs/base.yaml --config configs/models/qwen2.5-1.5b.yaml \
  --generate.seed "$seed" --data.generated "$generated" "$@"
