#!/usr/bin/env bash
# Temporal-R1: Qwen2.5-VL-3B on Charades-STA.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=Qwen/Qwen2.5-VL-3B-Instruct

# At least: theirs answers in free sentences, many of which its reader cannot read, ours is asked for JSON.
step0 base_3b charades_sta_answer --at_least grounding/mIoU=37.22
baseline base_3b activitynet_answer
baseline base_3b_answer mvbench

train temporal_r1_sft charades_train_answer "charades_sta_answer activitynet_answer" \
    --prompt temporal_r1 --steps 0 --sft_steps -1 --sft_questions 16 --sft_lr 1e-5 --max_prompt_tokens 4096 \
    $TEMPORAL_R1_VIDEO
train temporal_r1 charades_train "charades_sta charades_sta_answer activitynet activitynet_answer mvbench" \
    --reward temporal_r1 --steps 630 $TEMPORAL_R1
