#!/usr/bin/env bash
# All checks: style, bash, types, tests. Makes .venv first if it must.
#   bash scripts/test.sh [--fast | --long | --faults] [pytest's options]
#     --fast      leaves out the tests marked slow
#     --long      runs those marked long too: many processes, machines, kills; about 25 minutes in all
#     --faults    of the tests runs tests/faults alone, with the whole kill campaign: 60 kills, a
#                 table at the end; CAMPAIGN_SEED=N draws the signals and moments of an earlier one
set -euo pipefail
# shellcheck source=scripts/lib/project.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/project.sh"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

options=()
for option in "$@"; do
  case "$option" in
    --fast) options+=(-m "not slow") ;;
    --faults) options+=(--long tests/faults) ;;
    *) options+=("$option") ;;
  esac
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
step python scripts/lib/audit.py
step python -m pytest -n "${TEST_PROCESSES:-2}" "${options[@]}"
