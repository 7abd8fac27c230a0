#!/usr/bin/env bash
# VideoChat-R1, table 6: captions. Step 0 has no published row to reach: the paper starts from Qwen2-VL-7B, which this code
# does not read, so base_answer is measured for comparison only.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

baseline base_answer dream1k

train sft_captions fiber1k dream1k --sft_steps -1 $SFT
train grpo_captions fiber1k dream1k --reward videochat_r1 --judge Qwen/Qwen2.5-7B-Instruct --steps -1 --prompt think $GRPO
