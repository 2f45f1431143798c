#!/usr/bin/env bash
# The GPU rows of docs/speed.md, and the runs whose time counts, in pieces of under 8 minutes each. The page with its
# rows and the run folders go to $OUT; what a piece that trains had no time for it takes up when it is named again, and
# one that measures keeps the tasks that it had finished.
#
#   DATA=tiny-imagenet-200.zip OUT=out bench/h100.sh training inference rest   # beside peers, and the floor
#   DATA=tiny-imagenet-200 OUT=out bench/h100.sh input       # a folder here: ImageFolder reads from it
#   DATA=tiny-imagenet-200.zip OUT=out bench/h100.sh vit-12  # or any other recipe, in full; SEED=1 for another seed
#   DATA=tiny-imagenet-200.zip OUT=out bench/h100.sh tiny-imagenet tiny-imagenet   # pre-trained first: name it twice
#   vitrail bench --add out/results/speed/NAME.json --output docs/speed.md     # afterwards: the rows, on the page
#   bench/h100.sh --toy                                      # every piece, small, on the processor: do they run?
#
# It needs torch >= 2.11, what vitrail needs and the peers (pip install 'vitrail[bench]'), and no network.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
OUT=${OUT:-$root/bench/out}
SECONDS_A_PIECE=${SECONDS_A_PIECE:-450}
SEED=${SEED:-0}
bench=(--device cuda --precision bf16)
train=(--device cuda --precision bf16 --compile)

# Ended for want of time it has kept what it had: status 124, which is none to stop for.
vitrail() {
  local status=0
  timeout --signal=TERM "$SECONDS_A_PIECE" "$python" -m vitrail "$@" || status=$?
  [[ $status != 124 ]] || echo "time is up; name the piece again to go on"
  [[ $status == 0 || $status == 124 ]] || exit "$status"
}

# The run $1 of `vitrail $2 $3` and the flags behind it, begun or taken up.
run() {
  local folder=$OUT/$1-$SEED
  if [[ -f $folder/results.json ]]; then
    echo "$1 is done: $folder"
  elif [[ -f $folder/last/state.safetensors ]]; then
    vitrail "$2" --resume --output "$folder" --data "$DATA"
  else
    rm -rf "$folder" # ended before its first checkpoint
    vitrail "$2" "$3" --data "$DATA" --seed "$SEED" --output "$folder" "${train[@]}" "${@:4}"
  fi
}

piece() {
  echo "== $1, $(date -u +%H:%M:%S)"
  case $1 in
    training | inference) vitrail bench "$1" "${bench[@]}" --output "$OUT/docs/speed.md" ;;
    rest) vitrail bench profile memory start "${bench[@]}" --output "$OUT/docs/speed.md" ;;
    input) vitrail bench input "${bench[@]}" ${DATA:+--data "$DATA"} --output "$OUT/docs/speed.md" ;;
    tiny-imagenet*)
      local pretrained=$1-pretrained
      if [[ -f $OUT/$pretrained-$SEED/results.json ]]; then
        run "$1" train "$1" --from "$OUT/$pretrained-$SEED" "${small[@]}"
      else
        run "$pretrained" pretrain "$1" "${small[@]}" "${shape[@]}"
      fi ;;
    *) run "$1" train "$1" "${small[@]}" "${shape[@]}" ;;
  esac
}

small=() shape=()
if [[ ${1:-} == --toy ]]; then
  OUT=$(mktemp -d)
  trap 'rm -rf "$OUT"' EXIT
  bench=(--device cpu --precision fp32 --rounds 1 --seconds 0 --toy)
  train=(--device cpu --compile)
  small=(--epochs 2)
  shape=(--image-size 16 --patch-size 4 --hidden-size 32 --mlp-dim 64 --num-heads 2 --num-layers 1)
  mkdir -p "$OUT/docs"
  for name in training inference rest; do piece "$name"; done
  DATA='' piece input # of images that it makes
  DATA=digits
  run vit-12 train vit-12 "${small[@]}" "${shape[@]}" --stop-after 1
  rm "$OUT/vit-12-0/results.json" # as if its time had been up
  piece vit-12
  [[ $(wc -l < "$OUT/vit-12-0/metrics.jsonl") == 2 && -f $OUT/vit-12-0/results.json ]] || { echo "vit-12 was not taken up" >&2; exit 1; }
  train=(--device cpu)
  for name in tiny-imagenet tiny-imagenet; do piece "$name"; done
  shape+=(--first-size 8)
  piece speedrun
  shape=(--image-size 16) small=(--epochs 1) # minutes otherwise
  piece resnet-18
  for name in tiny-imagenet speedrun resnet-18; do
    [[ -f $OUT/$name-0/results.json ]] || { echo "$name was not trained" >&2; exit 1; }
  done
  echo "every piece runs"
  exit
fi
[[ $# -gt 0 ]] || { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
[[ -n ${DATA:-} ]] || { echo "say where Tiny ImageNet is: DATA=tiny-imagenet-200.zip $0 $*" >&2; exit 2; }
"$python" - <<'CHECK'
import sys, torch
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"torch is {torch.__version__}; the rows are of 2.11 or later")
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
CHECK
mkdir -p "$OUT/docs"
for name in "$@"; do piece "$name"; done
