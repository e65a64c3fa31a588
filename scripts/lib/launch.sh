# shellcheck shell=bash
# The one place that starts train.py, evaluate.py, generate and cache-teacher. Sourced by the scripts after their line gpus=.
# shellcheck source=scripts/lib/project.sh
source "$(dirname "${BASH_SOURCE[0]}")/project.sh"
# shellcheck source=scripts/lib/processes.sh
source scripts/lib/processes.sh
# shellcheck source=scripts/lib/start.sh
source scripts/lib/start.sh
processes=$(count_processes "${gpus:-1}") launched=0

launch_train() { launch "$(value_of --run.output_dir "$@")" train.py "$@"; }
launch_evaluate() { launch "$(value_of --output_dir "$@")" evaluate.py "$@"; }
launch_cache() { launch "$(value_of --model.teacher_cache "$@")" -m distilllens cache-teacher "$@"; }
launch_generate() { launch "$(value_of --data.generated "$@")" -m distilllens generate "$@"; }

launch() { # FOLDER SCRIPT|-m MODULE ARGUMENT…: runs it on all processes; returns the run's own exit code
  local status="$1/status.json" begin child left own waiting=1 code=0 command
  start_with "$((launched++))"
  command+=("${@:2}")
  if dry_run; then run "${command[@]}" && return; fi
  if ! python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' 2>/dev/null; then
    echo "error: the Python packages are missing; bash scripts/setup.sh installs them into .venv" >&2
    return 2
  fi
  begin=$(date +%s) left=$(mktemp) # left: for the exit code, which torchrun turns into 1
  (trap - INT && DISTILLLENS_CODE_FILE="$left" exec "${command[@]}") & # in the background, so that a SIGTERM can be handed on
  child=$!
  trap 'waiting=1; hand_on "$child"' TERM
  trap 'waiting=1' INT # Ctrl-C reaches the child by itself
  while ((waiting)); do # a signal ends `wait`, not the child
    waiting=0
    wait "$child" && code=0 || code=$?
  done
  trap - TERM INT && own=$(<"$left") && rm -f "$left"
  ((code == 0)) || code=${own:-$(python scripts/lib/own_code.py "$status" "$begin" "$code")}
  return "$code"
}

value_of() { # FLAG ARGUMENT…: the last value given for FLAG
  local flag="$1" value=""
  while shift && (($#)); do
    [[ "$1" != "$flag" ]] || value="${2:-}"
    [[ "$1" != "$flag="* ]] || value="${1#*=}"
  done
  echo "$value"
}

is_finished() { # FOLDER: a run stands there that came to its end; says so
  grep -qs '"state": *"finished"' "$1/status.json" || return
  echo "$1 is finished and left alone; delete it to train it again." >&2
}
