#!/usr/bin/env bash
# All checks: style, bash, types, tests. Makes .venv first if it must.
#   bash scripts/test.sh [--fast] [pytest's options]     --fast leaves out the tests marked slow
set -euo pipefail
# shellcheck source=scripts/lib/project.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/project.sh"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

options=()
for option in "$@"; do
  if [[ "$option" == --fast ]]; then options+=(-m "not slow"); else options+=("$option"); fi
done
step() { # COMMAND…
  echo "== $1 ${2:-}" >&2
  run "$@"
}

bash scripts/setup.sh test
step ruff check .
step ruff format --check .
mapfile -t scripts < <(find scripts .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -name run \) | sort)
step shellcheck "${scripts[@]}"
step mypy
step python -m pytest -n "${TEST_PROCESSES:-2}" "${options[@]}"
