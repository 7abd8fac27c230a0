#!/usr/bin/env bash
# One command where there is a card: is it right, how fast is it, how much memory does it take?
# About 10 minutes; the limits of all parts add up to twice as much.
#
#     bash tests/gpu_run.sh                            results in $OUT, or in a new folder whose name is printed
#     bash tests/gpu_run.sh --device cpu --tiny        without a card, in tiny sizes: tries this script
#
# $OUT holds table.txt (what was measured beside what was expected), gpu_check.jsonl (every figure, one a line), bench/,
# the log of each part and all.log (all logs, each added when its part ends). They are complete up to the moment at which
# the run ends or is killed. The exit code is 1 where something that must hold does not. $PYTHON is the interpreter (default: python3) and needs what requirements.txt names.
#
# A machine without network may lack a decoder, or have another transformers. Carry the wheels in .whl/, and they are
# installed into a temporary folder that is searched first (VERSION: that of the machine's Python):
#
#     pip download --no-deps --only-binary=:all: --python-version VERSION --platform manylinux_2_28_x86_64 -d .whl av transformers
#
# Two steps. First correctness on the toy, in processes side by side: an error of the card ends only one of them. Then
# measurements, one at a time, because they share the card. No part stops another, and each has its own limit of seconds.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
export OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
trap 'rm -rf "$work"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM INT
cd "$root" || exit 1

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TMPDIR=$work
if ls .whl/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" .whl/*.whl
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
{ nvidia-smi || echo "no nvidia-smi here"; } >"$OUT/machine.txt" 2>&1

part() {  # part LIMIT NAME COMMAND...: its output goes to NAME.log, and at the end to all.log; its exit code to the table
    local limit=$1 name=$2 log=$OUT/$2.log start=$SECONDS child code
    shift 2
    trap 'kill $child 2>/dev/null' TERM
    timeout -k 5 "$limit" "$@" >"$log" 2>&1 &
    child=$!
    wait $child
    code=$?
    [ $code -gt 128 ] && wait $child  # a signal ends `wait` before the child has ended
    local line="== $name: exit code $code, $((SECONDS - start)) s"
    printf '{"section": "parts", "what": "part %s", "value": %d, "unit": "exit code", "seconds": %d}\n' \
        "$name" $code $((SECONDS - start)) >>"$OUT/gpu_check.jsonl"
    echo "$line" | cat - "$log" >>"$OUT/all.log"
    echo "$line"
    [ $code = 0 ] || tail -n 20 "$log"
}
check() {  # check LIMIT NAME SECTION...: a part that is sections of gpu_check.py
    local limit=$1 name=$2
    shift 2
    part "$limit" "$name" "$python" tests/gpu_check.py "${flags[@]}" --out "$OUT" "$@"
}
flags=(--device cuda)
[ $# -gt 0 ] && flags=("$@")

# Is it right? First one import alone: on a machine that has just started it takes long, and all parts wait for the same files.
part 100 imports "$python" -c "import torch, transformers, av; torch.zeros(1, device='${flags[1]}')" & wait
part  120 pytest "$python" -m pytest -q -n 0 -m gpu tests --ignore tests/test_train.py &
part  120 pytest_train "$python" -m pytest -q -n 0 -m gpu tests/test_train.py &
check 120 exact env exact graph &
check 120 toy_plain toy_plain &
check 120 toy_lora toy_lora &
check 120 toy_shard toy_shard &
check 120 toy_offload toy_offload &
check 120 dry_run dry_run &
wait
# How fast, and how much memory? Alone on the card, the questions that matter most first.
check 120 decode_3b decode_3b & wait
check 120 decode_7b decode_7b & wait
check 60 scoring scoring_3b scoring_7b & wait
check 60 vision vision & wait
check 50 memory memory & wait
check 120 peers peers & wait
check 300 default_run default_run & wait
check 55 micro rates patch_embed sdpa sampling value_product norms & wait
check 75 compiled compiled_layer compiled_decoding & wait

echo "results: $OUT"
"$python" tests/gpu_check.py --out "$OUT" --table
