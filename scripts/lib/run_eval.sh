# shellcheck shell=bash
# The loop behind every run_eval.sh, over the lines that users edit: scores what train_all.sh trained, into
#   results/eval_main/CKPT/APPROACH/TYPE[/seedN]/   (evaluate.py adds seedN/SET for each sampling seed and set)
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

evaluate_all() { # FLAG…: passed on to every evaluate.py, after all else, so that they win
  local run found there=() missing=()
  for run in $(told_runs); do
    if dry_run || [[ -d "$run" ]]; then there+=("$run"); else missing+=("$run"); fi
  done
  [[ ${#missing[@]} == 0 ]] || echo "Not trained, left out: ${missing[*]}" >&2
  found=$(comm -13 <(told_runs | sort -u) <(compgen -G "results/train/$CKPT_NAME/*/*/best" | cat - \
    <(compgen -G "results/train/$CKPT_NAME/*/*/seed*/best") | sort -u) | paste -sd " ")
  [[ -z "$found" ]] || echo "Trained, but not named by APPROACHES and TYPES, left out: $found" >&2
  found=$(present_sets)
  if [[ ${#there[@]} == 0 ]]; then
    echo "error: no trained model to score; the train_all.sh scripts beside this one train them" >&2
    return 2
  fi
  if [[ "$found" == "[]" ]]; then
    echo "error: data/ holds none of the sets ${sets:?}; see data/README.md" >&2
    return 3
  fi
  for run in "${there[@]}"; do
    launch_evaluate --config "configs/eval/${protocol:?}.yaml" --checkpoint "$run" \
      --sets "$found" --eval.seeds "[$(tr -s " " , <<<"${seeds:?}")]" --output_dir "$(results_of "$run")" "$@"
  done
}

told_runs() { # → the best/ folders of $approaches × $types, with their training seeds if they have; then $also
  local approach type run
  for approach in ${approaches:?}; do
    for type in $([[ " sft seqkd " == *" $approach "* ]] && echo ce || echo "${types:?}"); do
      run="results/train/${CKPT_NAME:?}/$approach/$type"
      { compgen -G "$run/seed*/best" || echo "$run/best"; } | sort -V
    done
  done
  for run in ${also:-}; do echo "checkpoints/$run"; done
}

results_of() { # CHECKPOINT → its results folder
  local run="${1#results/train/}"
  [[ "$1" == results/train/* ]] || run="$CKPT_NAME/given/${1#checkpoints/}"
  echo "results/eval_main/${run%/best}"
}

present_sets() { # → those of $sets that data/ holds, as a list; a dry run asks for no data
  local set found=()
  for set in ${sets:?}; do
    if dry_run || [[ -f "data/$set/valid.jsonl" || -f "data/$set/11_/valid.jsonl" ]]; then
      found+=("$set")
    else
      echo "data/$set holds no valid.jsonl: set left out (python -m distilllens prepare --download)" >&2
    fi
  done
  (IFS=, && echo "[${found[*]}]")
}
