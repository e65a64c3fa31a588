#!/usr/bin/env bash
# checkpoints/SmolLM2-135M-Instruct answers the training prompts of Dolly, for seqkd/train_all.sh.
#   bash scripts/smollm2/tools/generate_data.sh [--section.key value …]     DRY_RUN=1: only print the command
set -euo pipefail

gpus="${GPUS:-1}"                                    # of this machine; fewer are used if fewer are there
limit="${LIMIT:-256}"                                # prompts; a training of 60 steps takes 240
seed="${SEED:-10}"                                   # sampling seed
generated="${GENERATED:-data/generated/SmolLM2-135M-Instruct}"  # folder of the answers

# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/launch.sh"
launch_generate --config configs/base.yaml --config configs/models/smollm2.yaml \
  --generate.limit "$limit" --generate.seed "$seed" --data.generated "$generated" "$@"
