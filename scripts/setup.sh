#!/usr/bin/env bash
# Makes .venv with everything DistillLens needs; does nothing when it is up to date.
#   bash scripts/setup.sh [EXTRA …]     extras of pyproject.toml: test, quant, smollm2, similarity, judge, harness, vllm
# PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
# shellcheck source=scripts/lib/project.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/project.sh"

extras=$(cat .venv/extras - <<<"$*" 2>/dev/null | tr -s ' ' '\n' | grep . | sort -u | paste -sd, || true)
stamp=$(cat requirements.txt pyproject.toml - <<<"$extras" | cksum)
[[ "$(cat .venv/stamp 2>/dev/null || true)" != "$stamp" ]] || exit 0

for python in ${PYTHON:-python3 python3.13 python3.12 python3.11} none; do
  ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || break
done
if [[ "$python" == none ]]; then
  echo "error: Python 3.11 or newer is needed, here is $(python3 --version 2>&1); PYTHON=PATH names another" >&2
  exit 2
fi

echo "Setting up .venv with $("$python" --version): once, usually 2 to 7 minutes, 2 GB." >&2
command -v nvidia-smi >/dev/null || echo "No GPU here: 'Without a GPU' in README.md spares the CUDA libraries." >&2
[[ -x .venv/bin/python ]] || run "$python" -m venv .venv || {
  echo "error: no virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 2
}

now_doing() { grep -E '^ *(Collecting|Processing|Downloading|Building|Installing)' .venv/setup.log | tail -n 1 || true; }
install() { # with a sign of life every 15 seconds
  "$@" >.venv/setup.log 2>&1 &
  local pip=$!
  trap 'kill "$pip" 2>/dev/null || true' EXIT
  while kill -0 "$pip" 2>/dev/null; do
    sleep 1
    ((SECONDS % 15)) || echo "  $SECONDS s, $(du -sm .venv | cut -f 1) MB: $(now_doing | cut -c 1-80)" >&2
  done
  trap - EXIT
  wait "$pip"
}
pip=(.venv/bin/python -m pip install --disable-pip-version-check --editable ".${extras:+[$extras]}")
if dry_run; then run "${pip[@]}" && exit; fi
install "${pip[@]}" || {
  tail -n 20 .venv/setup.log >&2
  echo "error: the packages could not be installed; the lines above and .venv/setup.log say why" >&2
  exit 1
}
tr ',' ' ' <<<"$extras" >.venv/extras
echo "$stamp" >.venv/stamp
echo "Installed in $SECONDS s." >&2
