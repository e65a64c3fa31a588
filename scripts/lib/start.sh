# shellcheck shell=bash
# What starts the processes of a run: python, torchrun, or DeepSpeed's launcher. Sourced by launch.sh.
#   PROCESSES=2    so many processes on this machine, whatever gpus= says (without a GPU: gloo on the CPU)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=HOST [MASTER_PORT=29500]    torchrun; started on each machine
#   HOSTFILE=FILE [MASTER_ADDR=HOST] [MASTER_PORT=29500]         DeepSpeed's launcher; started once, the rest by ssh
#   HOSTFILE=FILE NODE_RANK=0 MASTER_ADDR=HOST                   the same without ssh; started on each machine
# The scripts in scripts/launch/ set these.
SAVE_SECONDS="${SAVE_SECONDS:-600}" # after SIGTERM; torchrun's own 30 would kill the save of a large model

slots() { sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$HOSTFILE"; } # of the hostfile's machines, a line each

count_all() { # the processes of all machines
  if [[ -n "${HOSTFILE:-}" ]]; then echo $(($(slots | paste -sd+))); else echo $((${processes:?} * ${NNODES:-1})); fi
}

start_with() { # NUMBER: sets `command` to all that stands before train.py; NUMBER counts the runs of this script
  # Machines do not end a run in the same second: at the same port one could meet the run before.
  local port=$((${MASTER_PORT:-29500} + $1))
  # Threads that wait must sleep: where cores are shared, spinning at least doubled the time of a step.
  command=(env "OMP_NUM_THREADS=$(count_threads "$processes")" "OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}")
  if [[ -n "${HOSTFILE:-}" ]]; then # its processes elsewhere get no variable of ours but by this `env`
    command=(deepspeed --quiet --hostfile "$HOSTFILE" --master_port "$port" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"}
      ${NODE_RANK:+--no_ssh --node_rank "$NODE_RANK"} --no_local_rank --no_python "${command[@]}" "$(command -v python)")
  elif [[ -n "${NNODES:-}" ]]; then
    command+=(torchrun --nnodes "$NNODES" --node_rank "${NODE_RANK:?}" --nproc_per_node "$processes" --max_restarts 0
      --shutdown_timeout "$SAVE_SECONDS" --master_addr "${MASTER_ADDR:?}" --master_port "$port")
  elif ((processes > 1)); then
    command+=(torchrun --standalone --nproc_per_node "$processes" --shutdown_timeout "$SAVE_SECONDS") # on a free port
  else
    command+=(python)
  fi
}

hand_on() { # PID: SIGTERM to it; DeepSpeed's launcher, without ssh, would die of it and leave its child to itself
  local to="$1"
  [[ -z "${HOSTFILE:-}" || -z "${NODE_RANK:-}" ]] || read -r to <"/proc/$1/task/$1/children" || true
  kill -TERM "${to% }" 2>/dev/null || true
}

start_script() { # SCRIPT.sh|train.py|evaluate.py|generate|cache-teacher ARGUMENT…: this machine's part of it
  case "${1:-}" in
    train.py) launch_train "${@:2}" ;;
    evaluate.py) launch_evaluate "${@:2}" ;;
    generate) launch_generate "${@:2}" ;;
    cache-teacher) launch_cache "${@:2}" ;;
    *.sh) exec bash "$@" ;; # a signal reaches it directly
    *) echo "error: what shall run? one of $(ls -m scripts/*/*/*.sh), train.py, evaluate.py, generate or cache-teacher" >&2 && return 2 ;;
  esac
}
