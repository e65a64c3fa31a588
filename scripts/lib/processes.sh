# shellcheck shell=bash
# How many processes a run gets on this machine, and how many threads each. Sourced by launch.sh.

count_gpus() {
  local found=0
  if command -v nvidia-smi >/dev/null; then
    found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  fi
  if ((found > 0)) && [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    found=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true) # -1 means none
  fi
  echo "$found"
}

count_processes() { # WANTED: one for each GPU that is wanted and there; without a GPU one
  local wanted="$1" found
  found=$(count_gpus)
  if [[ -n "${PROCESSES:-}" ]]; then
    echo "$PROCESSES"
    return
  fi
  if ((found == 0)); then
    found=1
    ((wanted <= 1)) || echo "No GPU here: one process on the CPU (PROCESSES=2 in the environment for two)." >&2
  elif ((found < wanted)); then
    echo "gpus=$wanted, but there are $found: as many processes." >&2
  fi
  echo $((found < wanted ? found : wanted))
}

count_threads() { # PROCESSES: the cores shared out, at least one each
  local cores
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  echo "${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}"
}
