#!/usr/bin/env bash
# VideoChat-R1, table 6: is the quality of a video low or high?
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step0 base_answer vidtab_qa classification/accuracy=70.7

train sft_quality quality_train vidtab_qa --sft_steps -1 $SFT
train grpo_quality quality_train vidtab_qa --steps -1 --prompt think $GRPO
