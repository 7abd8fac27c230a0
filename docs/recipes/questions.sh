#!/usr/bin/env bash
# VideoChat-R1, table 5: fine-tuning and GRPO on NExT-GQA, with and without windows.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step0 base_answer nextgqa gqa/accuracy=59.5 gqa/mIoU=15.4
step0 base_think nextgqa gqa/accuracy=53.3 gqa/mIoU=20.2
baseline base_answer nextgqa_qa
baseline base_think nextgqa_qa videomme

train sft_qa nextgqa_val_qa "nextgqa_qa videomme" --sft_steps -1 $SFT
train sft_gqa nextgqa_val "nextgqa videomme mvbench perception_test" --sft_steps -1 $SFT
train grpo_qa_answer nextgqa_val_qa "nextgqa_qa nextgqa videomme" --steps -1 --prompt answer $GRPO
train grpo_gqa_answer nextgqa_val "nextgqa charades_sta activitynet got10k videomme" --steps -1 --prompt answer $GRPO
train grpo_qa nextgqa_val_qa "nextgqa_qa videomme" --steps -1 --prompt think $GRPO
train grpo_gqa nextgqa_val "nextgqa videomme" --steps -1 --prompt think $GRPO
