#!/usr/bin/env bash
# The whole way on generated data, on any machine: a teacher, a base student, three ways to train it further,
# their scores and a report. About 10 minutes on two cores once .venv stands; a second call goes on where it was.
#   bash scripts/quickstart.sh [--section.key value …]     flags for every training, e.g. --optim.max_steps 20
set -euo pipefail

gpus="${GPUS:-1}"
trained="results/train/skills"
scored="results/eval_main/skills"

# shellcheck source=scripts/lib/project.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/project.sh"
bash scripts/setup.sh
# shellcheck source=scripts/lib/launch.sh
source scripts/lib/launch.sh

# bf16 where the machine has instructions for it: the teacher's step took 0.15 instead of 0.27 CPU seconds.
precision=fp32
if (($(count_gpus) > 0)) || grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=bf16; fi

stage() { echo && echo "== $* ($((SECONDS / 60)) min $((SECONDS % 60)) s so far)"; } >&2

train() { # FOLDER OBJECTIVE STAGE FLAG…: configs/objectives/OBJECTIVE.yaml, configs/quickstart/STAGE.yaml
  if is_finished "$trained/$1"; then return; fi
  launch_train --config configs/base.yaml --config configs/models/skills.yaml \
    --config "configs/objectives/$2.yaml" --config "configs/quickstart/$3.yaml" \
    --deepspeed "configs/deepspeed/zero1_$precision.json" \
    --run.output_dir "$trained/$1" --run.name "${1%/ce}" "${@:4}"
}

stage "1 of 6: makes the skills data and two small random models; some seconds"
[[ -f data/skills/valid.jsonl && -d checkpoints/skills-student-init ]] ||
  run python -m distilllens skills --out data/skills --models checkpoints
stage "2 of 6: trains the teacher; about 4 minutes"
train teacher/ce sft teacher "$@"
stage "3 of 6: trains the base student; about 1 minute"
train base/ce sft base "$@"
stage "4 of 6: trains three students from it: sft, kd, distill_lens; about 2 minutes"
train sft/ce sft student "$@"
train kd/fkl kd student "$@"
train distill_lens/fkl distill_lens student "$@"

runs=(teacher/ce base/ce sft/ce kd/fkl distill_lens/fkl)
stage "5 of 6: scores all five on the held-out test with three sampling seeds; about 2 minutes"
for name in "${runs[@]}"; do
  launch_evaluate --config configs/eval/skills.yaml --checkpoint "$trained/$name/best" \
    --output_dir "$scored/$name" --name "${name%/ce}"
done

stage "6 of 6: tables, curves and lens maps"
run python -m distilllens report "${runs[@]/#/$trained/}" --out results/report/skills
dry_run || echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Open results/report/skills/report.html" >&2
