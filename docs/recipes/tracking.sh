#!/usr/bin/env bash
# VideoChat-R1, table 4 and a row of table 2: fine-tuning and GRPO on GOT-10k, with the boxes of its own got_train.json.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step0 base_answer got10k tracking/AO=12.6 tracking/R@0.5=1.1 tracking/R@0.7=0

train sft_tracking got10k_train "got10k videomme mvbench perception_test" --sft_steps -1 $SFT
train grpo_tracking got10k_train "got10k charades_sta activitynet nextgqa videomme" --steps -1 --prompt think $GRPO

# Ours: eight evenly spaced boxes of GOT-10k's own annotation, and the frames that they were drawn on.
train grpo_tracking_aligned got10k_aligned_train "got10k_aligned got10k" --steps -1 --prompt think $GRPO
