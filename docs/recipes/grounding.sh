#!/usr/bin/env bash
# VideoChat-R1, table 3 and the first row of table 2: fine-tuning and GRPO on Charades-STA.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step0 base_answer charades_sta grounding/mIoU=29.0 grounding/R@0.3=44.7 grounding/R@0.5=24.2 grounding/R@0.7=11.1
baseline base_think charades_sta activitynet
baseline base_answer activitynet

train sft_tg charades_train "charades_sta activitynet" --sft_steps -1 $SFT
train sft_tg_3ep charades_train "charades_sta activitynet" --sft_steps -3 $SFT
train grpo_tg_answer charades_train "charades_sta activitynet videomme" --steps -1 --prompt answer $GRPO
train grpo_tg charades_train "charades_sta activitynet nextgqa got10k videomme" --steps -1 --prompt think $GRPO
train grpo_tg_3ep charades_train "charades_sta activitynet videomme" --steps -3 --prompt think $GRPO
