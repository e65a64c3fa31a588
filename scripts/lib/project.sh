# shellcheck shell=bash
# What every script begins with: the project's root, where all paths start, its .venv, and `run`.
#   DRY_RUN=1     every script prints the commands that it would run, and starts nothing
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
[[ "$PATH" == "$PWD/.venv/bin:"* ]] || export PATH="$PWD/.venv/bin:$PATH"

dry_run() { [[ "${DRY_RUN:-0}" == 1 ]]; }

run() { # COMMAND…: runs it, or prints it as it could be pasted into a shell
  local line
  if dry_run; then
    printf -v line '%q ' "$@"
    echo "${line% }"
  else
    "$@"
  fi
}
