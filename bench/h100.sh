#!/usr/bin/env bash
# The GPU rows of docs/speed.md, and the runs whose time counts, in pieces of under 8 minutes each. The page with its
# rows and the run folders go to $OUT; a run that its time was too short for goes on when its piece is named again.
#
#   DATA=tiny-imagenet-200.zip OUT=out bench/h100.sh speed        # training, inference and memory beside peers, the floor
#   DATA=tiny-imagenet-200 OUT=out bench/h100.sh input            # a folder here: ImageFolder reads from it
#   DATA=tiny-imagenet-200.zip OUT=out bench/h100.sh vit-12       # the original's 150 epochs
#   bench/h100.sh --toy                                           # every piece, small, on the processor: do they run?
#
# It needs torch >= 2.11, what vitrail needs and the peers (pip install 'vitrail[bench]'), and no network.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
OUT=${OUT:-$root/bench/out}
SECONDS_A_PIECE=${SECONDS_A_PIECE:-450}
device=cuda
bench=(--device cuda --precision bf16)
train=(--device cuda --precision bf16 --compile)

vitrail() {
  timeout --signal=TERM "$SECONDS_A_PIECE" "${PYTHON:-python3}" -m vitrail "$@"
}

# A training run of the recipe $1, begun or taken up again. Ended for want of time it has saved its state: status 124.
run() {
  local name=$1 status=0
  shift
  if [[ -f $OUT/$name/results.json ]]; then
    echo "$name is done: $OUT/$name"
  elif [[ -d $OUT/$name ]]; then
    vitrail train --resume --output "$OUT/$name" || status=$?
  else
    vitrail train "$name" --data "$DATA" --output "$OUT/$name" "${train[@]}" "$@" || status=$?
  fi
  [[ $status == 0 || $status == 124 ]] || exit "$status"
}

piece() {
  echo "== $1 on $device, $(date -u +%H:%M:%S)"
  case $1 in
    speed) vitrail bench training profile inference memory "${bench[@]}" --output "$OUT/docs/speed.md" ;;
    input) vitrail bench input "${bench[@]}" --data "$DATA" --output "$OUT/docs/speed.md" ;;
    vit-12) run vit-12 "${small[@]}" ;;
    *) echo "there is no piece $1; there are speed, input and vit-12" >&2; exit 2 ;;
  esac
}

small=()
if [[ ${1:-} == --toy ]]; then
  OUT=$(mktemp -d)
  trap 'rm -rf "$OUT"' EXIT
  device=cpu
  bench=(--device cpu --precision fp32 --rounds 1 --seconds 0)
  train=(--device cpu --compile)
  small=(--epochs 1 --image-size 16 --patch-size 4 --hidden-size 32 --mlp-dim 64 --num-heads 2 --num-layers 1)
  piece speed
  vitrail bench input "${bench[@]}" # of images that it makes
  DATA=digits SECONDS_A_PIECE=8 piece vit-12            # ended in the middle, most likely,
  DATA=digits piece vit-12                              # and taken up
  [[ -f $OUT/vit-12/results.json ]] && echo "every piece runs"
  exit
fi
[[ $# -gt 0 ]] || { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
[[ -n ${DATA:-} ]] || { echo "say where Tiny ImageNet is: DATA=tiny-imagenet-200.zip $0 $*" >&2; exit 2; }
mkdir -p "$OUT/docs"
for name in "$@"; do piece "$name"; done
