#!/usr/bin/env bash
# A training run on one node of eight GPUs, or on two: sbatch --nodes=2 docs/slurm.sh
# Submit it in the root of the repository. The time limit may be shorter than the run: five minutes before it is reached the
# job tells the run to save and end, and puts itself back into the queue; the next time it starts it goes on from there.
#SBATCH --job-name=grpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail

out=runs/7b  # a folder that all nodes see
resume=
if [ -f "$out/config.json" ]; then resume=--resume; fi
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over by itself

# One torchrun on each node; they meet at the first one. It passes SIGTERM on, and kills what has not saved and ended after
# 270 s: raise both times where a step and a checkpoint take longer.
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=8 --shutdown_timeout=270 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first_node:29500" \
    train.py --model Qwen/Qwen2.5-VL-7B-Instruct \
    --train_data charades_train.jsonl@Charades_v1_480 --eval_data charades_test.jsonl@Charades_v1_480 \
    --save_every 25 --out "$out" $resume &
run=$!

stop_and_requeue() {  # Slurm sends the signal to this script alone (B:)
    kill -TERM "$run"
    wait "$run" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop_and_requeue TERM
wait "$run"
