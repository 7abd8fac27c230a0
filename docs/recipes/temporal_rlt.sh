#!/usr/bin/env bash
# Temporal-RLT: a selection of samples whose answers differ, and a reward for letter and window. The pool, the number of
# answers and the thresholds are ours.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step0 base_think nextgqa gqa/accuracy=53.3 gqa/mIoU=20.2

# Eight answers to each question of the pool, then a selection and an equally large random one.
for pool in charades_train nextgqa_val nextqa_train; do
    source=${pool%%_*}
    make_data "$pool"
    if missing "runs/probe_$source/metrics.json"; then
        run torchrun --nproc_per_node="$GPUS" eval.py --model "$BASE" --prompt temporal_r1 --num_samples 8 \
            --data "$(entries "$pool")" $TEMPORAL_R1_VIDEO --out "runs/probe_$source"
    fi
    for rule in selected random; do
        if missing "data/${source}_$rule.jsonl"; then
            run python data.py select "runs/probe_$source/predictions.jsonl" --data "data/$pool.jsonl" \
                $([ $rule = selected ] || echo --control random) --out "data/${source}_$rule.jsonl"
        fi
    done
done

SELECTED="charades_selected nextgqa_selected nextqa_selected"
THREE="charades_sta activitynet nextgqa"
train temporal_rlt "$SELECTED" "$THREE rextime videomme_32 mvbench_32" --reward temporal_r1 --steps -1 $TEMPORAL_R1
train temporal_rlt_random "${SELECTED//selected/random}" "$THREE" --reward temporal_r1 --steps -1 $TEMPORAL_R1
train temporal_rlt_discrete "$SELECTED" "$THREE" --reward discrete --steps -1 $TEMPORAL_R1
train temporal_rlt_continuous "$SELECTED" "$THREE" --reward continuous --steps -1 $TEMPORAL_R1
