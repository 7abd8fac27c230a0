# What the recipes share: where data comes from, how a run is made and measured, and step 0. Sourced, not run.
#
#     bash docs/recipes/NAME.sh [--dry_run] [RUN ...]      all runs of the recipe, or those that are named
#
# Every step is left out when its output is whole, so the same command goes on after a stop. --dry_run prints all commands.
# GPUS=8 is the number of cards, MORE="--lora_rank 16" adds flags to every training command. data/, runs/, videos/ and the
# downloads lie in the root of the repository.
set -euo pipefail
RECIPE=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BASE=Qwen/Qwen2.5-VL-7B-Instruct
MODEL=$BASE  # what is trained
GPUS=${GPUS:-8}
DRY_RUN=
RUNS=()
for word in "$@"; do
    case $word in
        --dry_run) DRY_RUN=1 ;;
        -*) echo "unknown flag $word; usage: bash $0 [--dry_run] [RUN ...]" >&2; exit 2 ;;
        *) grep -Eq "^(train|baseline) $word " "$RECIPE" || { echo "$RECIPE has no run $word" >&2; exit 2; }
            RUNS+=("$word") ;;
    esac
done

# VideoChat-R1's settings; what they leave out is its published default.
SFT="--prompt answer --steps 0 --sft_questions 8 --sft_lr 2e-5"
GRPO="--questions 8 --group_size 8 --lr 1e-6 --beta 0.04 --keep_dead_groups"
# Temporal-R1's.
TEMPORAL_R1_VIDEO="--total_pixels 1605632 --min_pixels 3136"
TEMPORAL_R1="--prompt temporal_r1 --questions 16 --group_size 8 --lr 1e-6 --lr_schedule constant --weight_decay 0.01
    --beta 0.01 --entropy_bonus 0.001 --loss_norm token --max_new_tokens 2048 --max_prompt_tokens 4096
    $TEMPORAL_R1_VIDEO --keep_dead_groups"

# ---- steps -----------------------------------------------------------------------------------------------------------

run() {
    printf '%q ' "$@"
    echo
    [ "$DRY_RUN" ] || "$@"
}

# Whether a run is among those to make: all, where none is named.
wanted() {
    [ ${#RUNS[@]} = 0 ] || [[ " ${RUNS[*]} " == *" $1 "* ]]
}

declare -A SHOWN

# Whether a file has to be made. In a dry run none exists, and each is made once.
missing() {
    [ "$DRY_RUN" ] || { [ ! -e "$1" ]; return; }
    [ -z "${SHOWN[$1]:-}" ] && SHOWN[$1]=1
}

# FILE COMMAND...: the output of a command. Under its own name only when it is whole.
write() {
    local file=$1
    shift
    missing "$file" || return 0
    printf '%q ' "$@"
    echo "> $file"
    [ "$DRY_RUN" ] || { "$@" > "$file.part"; mv "$file.part" "$file"; }
}

# ---- data ------------------------------------------------------------------------------------------------------------

# The published annotations of each data set, and its split.
declare -A FROM=(
    [charades_train]="charades_sta --src charades_sta --split train"
    [charades_test]="charades_sta --src charades_sta --split test"
    [activitynet_test]="activitynet_captions --src activitynet --split val_2"
    [got10k_train]="videochat_r1_tracking --src Annotations/Got/got_train.json"
    [got10k_published]="videochat_r1_tracking --src Annotations/Got/got_val.json"
    [got10k_aligned_train]="got10k --src videos/GOT-10k --split train"
    [got10k_aligned_val]="got10k --src videos/GOT-10k --split val"
    [nextgqa_val]="nextgqa --src nextgqa --split val"
    [nextgqa_test]="nextgqa --src nextgqa --split test"
    [nextqa_train]="nextqa --src nextqa --split train"
    [quality_train]="videochat_r1_quality --src Annotations/VideoEval/Quality_Access/annotations/Quality_Access_100shot.json"
    [quality_test]="videochat_r1_quality --src Annotations/VideoEval/Quality_Access/annotations/Quality_Access_test.json"
    [videomme]="videomme --src videomme/videomme.jsonl"
    [mvbench]="mvbench --src MVBench/json"
    [perception_test]="perception_test --src perception_test --split valid"
    [rextime]="rextime --src rextime/rextime_val.jsonl"
)

ROWS_OF_PARQUET='import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.stdout, orient="records", lines=True)'

videos_of() {
    case $1 in
        charades_*) echo videos/Charades_v1_480 ;;
        activitynet_*) echo videos/ActivityNet ;;
        got10k_*) echo videos/GOT-10k ;;
        nextgqa_* | nextqa_*) echo videos/NExTVideo ;;
        quality_*) echo videos/DIVIDE-MaxWell ;;
        videomme*) echo videos/Video-MME/data ;;
        mvbench) echo MVBench/video ;;
        perception_test) echo videos/Perception_Test ;;
        rextime) echo videos/ReXTime ;;
        fiber1k) echo videos/FIBER-1k ;;
        dream1k) echo videos/Dream-1k ;;
    esac
}

# The data sets as --train_data and --data want them.
entries() {
    for name in "$@"; do
        echo "data/$name.jsonl@$(videos_of "$name")"
    done
}

# Make data/NAME.jsonl for each NAME. What is trained on is decoded first, and only what can be read is kept.
make_data() {
    [ "$DRY_RUN" ] || mkdir -p data
    local name
    for name in "$@"; do
        case $name in
            fiber1k | dream1k) run test -s "data/$name.jsonl" ;;  # the reader's own: there is no converter
            *_selected | *_random) ;;  # temporal_rlt.sh makes them
            # Questions without windows are the grounded ones under another task.
            nextgqa_*_qa) make_data "${name%_qa}"
                write "data/$name.jsonl" sed 's/"task": "gqa"/"task": "qa"/' "data/${name%_qa}.jsonl" ;;
            # A prompt without thought, for a style that has one, is a field of the sample.
            *_answer) make_data "${name%_answer}"
                write "data/$name.jsonl" sed 's/^{/{"think": false, /' "data/${name%_answer}.jsonl" ;;
            # One question a video, the first: 5,338 of 12,408.
            charades_train_videos) make_data charades_train
                write "data/$name.jsonl" awk 'match($0, /"video": "[^"]*"/) && !seen[substr($0, RSTART, RLENGTH)]++' \
                    data/charades_train.jsonl ;;
            videomme_short) make_data videomme
                write "data/$name.jsonl" grep '"category": "short"' data/videomme.jsonl ;;
            videomme) write videomme/videomme.jsonl python -c "$ROWS_OF_PARQUET" videomme/test-00000-of-00001.parquet
                convert "$name" "data/$name.jsonl" ;;
            *_train | nextgqa_val) convert "$name" "data/all/$name.jsonl"
                keep_readable "$name" ;;
            *) convert "$name" "data/$name.jsonl" ;;
        esac
    done
}

convert() {
    missing "$2" || return 0
    # shellcheck disable=SC2086  # several words
    run python data.py convert ${FROM[$1]} --out "$2"
}

# data/all/NAME.jsonl without what training could not read. A folder of videos that is half unpacked would pass for a small
# data set: more than one bad line in a hundred is an error.
keep_readable() {
    local checked=data/checked/$1
    if missing "$checked/bad.jsonl"; then
        run python data.py check "data/all/$1.jsonl@$(videos_of "$1")" --out "$checked" || [ -e "$checked/bad.jsonl" ]
    fi
    if [ -z "$DRY_RUN" ] && (( 100 * $(wc -l < "$checked/bad.jsonl") > $(wc -l < "data/all/$1.jsonl") )); then
        echo "$checked/bad.jsonl has more than 1 % of data/all/$1.jsonl, with reasons; mend the videos, delete $checked" >&2
        exit 1
    fi
    write "data/$1.jsonl" cat "$checked/good.jsonl"
}

# ---- measuring -------------------------------------------------------------------------------------------------------

# What VideoChat-R1.5's script for Video-MME shows; of 512 frames each has 128 tokens at least, 34,000 in all.
LONG="--max_frames 512 --total_pixels 10838016 --min_pixels 100352 --max_prompt_tokens 40000"
# Each benchmark's data, and the flags of eval.py.
declare -A ASKED=(
    [charades_sta]="charades_test --max_new_tokens 2048 --benchmark charades_sta"
    [activitynet]="activitynet_test --max_new_tokens 2048 --benchmark activitynet"
    [charades_sta_answer]="charades_test_answer --benchmark charades_sta"
    [activitynet_answer]="activitynet_test_answer --benchmark activitynet"
    [nextgqa]="nextgqa_test --benchmark nextgqa"
    [nextgqa_qa]="nextgqa_test_qa"
    [got10k]="got10k_published --benchmark got10k"
    [got10k_aligned]="got10k_aligned_val"
    [vidtab_qa]="quality_test --benchmark vidtab_qa"
    [dream1k]="dream1k --judge Qwen/Qwen2.5-7B-Instruct --benchmark dream1k"
    [videomme]="videomme_short --benchmark videomme"
    [videomme_all]="videomme $LONG --benchmark videomme"
    [videomme_looks]="videomme $LONG --looks 2 --benchmark videomme"
    [mvbench]="mvbench --benchmark mvbench"
    [perception_test]="perception_test --benchmark perception_test"
    [rextime]="rextime --benchmark rextime"
    [videomme_32]="videomme --max_frames 32 --benchmark videomme"
    [mvbench_32]="mvbench --max_frames 32 --benchmark mvbench"
)

# How a base model is asked; a trained one is asked as it was trained.
model_of() {
    case $1 in
        base_answer) echo "$BASE --prompt answer" ;;
        base_think) echo "$BASE --prompt think" ;;
        base_3b) echo "Qwen/Qwen2.5-VL-3B-Instruct --prompt temporal_r1 $TEMPORAL_R1_VIDEO" ;;
        base_3b_answer) echo "Qwen/Qwen2.5-VL-3B-Instruct --prompt answer $TEMPORAL_R1_VIDEO" ;;
        *) echo "runs/$1/final" ;;
    esac
}

# RUN BENCHMARK...: runs/RUN/BENCHMARK/metrics.json. An answer that was written is not asked for again.
measure() {
    local name=$1 benchmark data flags
    shift
    for benchmark in "$@"; do
        read -r data flags <<< "${ASKED[$benchmark]}"
        if missing "runs/$name/$benchmark/metrics.json"; then
            make_data "$data"
            # shellcheck disable=SC2046,SC2086  # several words each
            run torchrun --nproc_per_node="$GPUS" eval.py --model $(model_of "$name") --data "$(entries "$data")" $flags \
                --out "runs/$name/$benchmark"
        fi
    done
}

# RUN BENCHMARK NAME=PERCENT...: stop where the base model does not reach its published row. STEP0=go_on only says so.
step0() {
    measure "$1" "$2"
    run python docs/recipes/step0.py "runs/$1/$2/metrics.json" "${@:3}" || [ "${STEP0:-stop}" = go_on ]
}

# RUN BENCHMARK...: another row of the base model, which nothing depends on.
baseline() {
    wanted "$1" || return 0
    measure "$@"
}

# ---- training --------------------------------------------------------------------------------------------------------

# RUN "DATA ..." "BENCHMARK ..." FLAGS...: train a run and measure it on each benchmark.
train() {
    local name=$1 data=$2 benchmarks=$3 resume=
    shift 3
    wanted "$name" || return 0
    if missing "runs/$name/summary.json"; then
        # shellcheck disable=SC2086
        make_data $data
        if [ -z "$DRY_RUN" ] && [ -e "runs/$name/config.json" ]; then
            resume=--resume
        fi
        # shellcheck disable=SC2046,SC2086
        run torchrun --nproc_per_node="$GPUS" train.py $resume --model "$MODEL" --train_data $(entries $data) "$@" \
            ${MORE:-} --out "runs/$name"
    fi
    # shellcheck disable=SC2086
    measure "$name" $benchmarks
}
