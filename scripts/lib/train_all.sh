# shellcheck shell=bash
# The loop behind every train_all.sh, over the lines that users edit: one run for each type and seed in
#   results/train/CKPT/APPROACH/TYPE[/seedN]/      (TYPE of sft and seqkd, which have no divergence: ce)
# shellcheck source=scripts/lib/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

train_all() { # FLAG…: passed on to every train.py, after all else, so that they win
  local layers=() options=() all name type seed folder
  for name in "${configs[@]:?}"; do
    if [[ ! -f "configs/$name.yaml" ]]; then
      echo "error: there is no configs/$name.yaml, only: $(ls -m "configs/$(dirname "$name")")" >&2
      return 2
    fi
    layers+=(--config "configs/$name.yaml")
  done
  all=$(count_all)
  if ((all != ${gpus:?})); then
    echo "$all process(es), gpus=$gpus: an optimizer step takes $all/$gpus of the records that $gpus would;" \
      "$gpus/$all times their --optim.accumulation or --optim.micro_batch_size makes up for it." >&2
  fi
  for type in ${types:?}; do
    for seed in ${seeds:?}; do
      folder="results/train/${CKPT_NAME:?}/${approach:?}/$type"
      [[ "$seeds" != *" "* ]] || folder+="/seed$seed"
      if is_finished "$folder"; then continue; fi
      options=(--model.student "checkpoints/$CKPT_NAME" --run.seed "$seed" --run.output_dir "$folder")
      [[ "$type" == ce ]] || options+=(--objective.divergence "$type")
      launch_train "${layers[@]}" "${options[@]}" "$@"
    done
  done
}
