#!/usr/bin/env bash
# VideoChat-R1, tables 1, 2 and 8 (a second look): several tasks in one run. GROUNDING=charades_train_videos trains on one question a video.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step0 base_answer charades_sta grounding/mIoU=29.0 grounding/R@0.5=24.2 grounding/R@0.7=11.1
step0 base_answer nextgqa gqa/accuracy=59.5 gqa/mIoU=15.4
step0 base_answer got10k tracking/AO=12.6 tracking/R@0.5=1.1
baseline base_answer activitynet videomme mvbench perception_test videomme_all videomme_looks

TWO="${GROUNDING:-charades_train} nextgqa_val"
THREE="$TWO got10k_train"
FOUR="charades_sta activitynet nextgqa got10k"  # the benchmarks of what was trained, and ActivityNet
train sft_joint "$THREE" "$FOUR" --sft_steps -1 $SFT
train grpo_tg_gqa "$TWO" "$FOUR videomme" --steps -1 --prompt answer $GRPO
train videochat_r1 "$THREE" "$FOUR videomme mvbench perception_test" --steps -1 --prompt answer $GRPO
train videochat_r1_thinking "$THREE" "$FOUR videomme mvbench perception_test videomme_all videomme_looks" --steps -1 --prompt think $GRPO
