#!/usr/bin/env bash
# The whole line on real text: corpus -> tokenizer -> shards -> ZeRO-2 training, stopped and
# resumed -> evaluation -> Hugging Face export -> report -> a generated continuation.
#
#   ./launch/quickstart.sh [RUN_DIR]              default: runs/quickstart
#   STEPS=20 ./launch/quickstart.sh [RUN_DIR]     a shorter look, a worse model (default: 320 steps,
#                                                 or as begun)
#
# Every GPU it finds trains in bf16; without one, 2 CPU ranks train in fp32, in about 10 minutes on 2
# cores. A second call finds what is done. Each stage is a command of its own; this script only
# calls them in order.
set -euo pipefail

# shellcheck source=launch/shell/install.sh
source "$(dirname "$0")/shell/install.sh"
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) fail "$1: not a known flag; $0 --help says what there is" ;;
esac
[ $# -le 1 ] ||
  fail "${*:2}: not known beside the directory; $0 --help says what there is" \
    "(STEPS stands before it)"
[ -z "${STEPS:-}" ] || need_count STEPS "$STEPS" 2

run_dir=${1:-$REPOSITORY/runs/quickstart}
if [ -e "$run_dir" ] && [ ! -d "$run_dir" ]; then
  fail "$run_dir: is a file; give a directory, or one that is not there yet"
fi
mkdir -p "$run_dir" 2> /dev/null ||
  fail "$run_dir: this directory can't be made; give another one"
run_dir=$(cd "$run_dir" && pwd)
corpus=$run_dir/corpus
mixture=$corpus/mixture.yaml

# Steps of the run that is there, from the recipe it began with; nothing if there is none.
steps_there() {
  [ ! -f "$run_dir/recipe.yaml" ] ||
    awk '$1 == "train_tokens:" { all = $2 } $1 == "global_batch_tokens:" { step = $2 }
      END { if (all > 0 && step > 0) print int(all / step) }' "$run_dir/recipe.yaml"
}

there=$(steps_there)
steps=${STEPS:-${there:-320}}
if [ -n "$there" ] && [ "$steps" -ne "$there" ]; then
  fail "STEPS=$STEPS: the run in $run_dir has $there steps; leave STEPS out to go on with it," \
    "or give another directory"
fi
if [ -f "$run_dir/summary.txt" ]; then
  exec cat "$run_dir/summary.txt"
fi
if [ -e "$mixture" ] && ! cmp -s "$REPOSITORY/launch/demo/quickstart.yaml" "$mixture"; then
  fail "$mixture: is not the quick start's; give another directory, or move that file away"
fi
half=$((steps / 2)) # here the run is stopped, and resumed from its checkpoint

install_project demo
cd "$REPOSITORY"

stage() {
  if [ -t 1 ]; then
    printf '\n\033[1m%s\033[0m\n' "$*" # in bold
  else
    printf '\n%s\n' "$*"
  fi
}

took=() # how long the whole job took is known if nothing of it was there before
[ -d "$corpus" ] || took=("$(date +%s)")

stage "1/8  corpus: 249 State of the Union addresses"
[ -e "$mixture" ] || install -D -m 644 launch/demo/quickstart.yaml "$mixture"
[ -f "$corpus/corpus.parquet" ] || python launch/demo/demo_corpus.py "$corpus/corpus.parquet"

stage "2/8  tokenizer: byte-level BPE, exactly 65,536 ids"
[ -d "$corpus/tokenizer" ] ||
  python -m data_prep.train_tokenizer --algorithm byte_bpe --vocab-size 65536 \
    --source "$corpus/corpus.parquet" --output-dir "$corpus/tokenizer"

stage "3/8  shards: uint16 ids, memory-mapped, fingerprinted"
python -m data_prep.build_shards --mixture "$mixture" --output-dir "$run_dir/dataset"
python -m data_prep.verify "$run_dir/dataset"

# A step has 6 windows in all, or a few more where 6 does not divide over the ranks.
gpus=$(python launch/count_gpus.py)
ranks=$((gpus > 0 ? gpus : 2))
windows_of_rank=$(((6 + ranks - 1) / ranks))
step_tokens=$((windows_of_rank * ranks * 128)) # 128: the recipe's model.seq_len
train() {
  ./launch/pretrain.sh --recipe quickstart --data-dir "$run_dir/dataset" --run-dir "$run_dir" \
    --ranks "$ranks" --batch.micro_batch_size=$windows_of_rank \
    --batch.global_batch_tokens=$step_tokens --train_tokens=$((steps * step_tokens)) \
    --log.prompts="The state of the Union" "$@"
}
stage "4/8  training: ZeRO-2, $ranks ranks, stopped after $half of $steps steps"
[ -f "$run_dir/checkpoints/latest" ] || train --stop-at-step $half

stage "5/8  training: resumed from the checkpoint"
train

stage "6/8  evaluation on the held-out addresses, fp32 masters"
python -m pretrain.evaluate --run-dir "$run_dir"

export_as() { # FOLDER ARCHITECTURE
  python -m pretrain.export_hf --run-dir "$run_dir" --output-dir "$run_dir/$1" --architecture "$2"
}
stage "7/8  export to Hugging Face format, in both forms"
export_as hf tablefree
export_as gpt_neox gpt_neox

stage "8/8  report: one page that explains the run"
python -m pretrain.report "$run_dir" --output "$run_dir/report.html"

python launch/demo/summary.py "$run_dir" $half "${took[@]}"
