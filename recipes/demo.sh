#!/usr/bin/env bash
# Make the bundled demo model, its adapter, Medusa heads, draft model and skip list from the Python source on this
# machine. Nothing is fetched.
#
#   recipes/demo.sh
#
# A step whose result lies in build/demo is skipped, and an interrupted training goes on where it was: to make a
# step again, delete its folder and those of the steps after it.
#
# MINUTES         how long to pre-train
# ADAPTER_STEPS   how many steps to train the adapter, the Medusa heads, and the draft model
# HUMANEVAL       HumanEval.jsonl.gz, an absolute path: its problems are kept out of the corpus and measure the model;
#                 the sublayers to skip are searched on the first eight
set -euo pipefail

cd "$(dirname "$0")/.."
export PYTHONPATH=.  # the package of this checkout, not an installed one
python=.venv/bin/python
corpus=build/demo/corpus target=build/demo/target model=build/demo/model
own=build/demo/own.jsonl adapter=build/demo/adapter medusa=build/demo/medusa draft_model=build/demo/draft_model
skips=build/demo/skips
installed=kangaroo/assets/demo

# The program of this checkout, whether or not it is installed.
kangaroo() { $python -c 'from kangaroo.cli import main; main()' "$@"; }
step() { printf '\n== %s\n' "$*"; }

# What a step writes last tells whether it came to its end.
step "corpus: $corpus"
if [[ ! -e $corpus/corpus.json ]]; then
    if [[ -n ${HUMANEVAL:-} ]]; then
        $python recipes/corpus.py --output $corpus --exclude-jsonl "$HUMANEVAL"
    else
        echo "HUMANEVAL is not set: benchmark problems are not kept out"
        $python recipes/corpus.py --output $corpus
    fi
fi

step "target: $target"
if ! grep -qs '"done": true' $target/progress.json; then
    $python recipes/pretrain.py --corpus $corpus --output $target --minutes "${MINUTES:-82}" --batch-tokens 4096
fi

step "checkpoint: $model"
if [[ ! -e $model/generation_config.json ]]; then
    $python recipes/export.py --state $target --corpus $corpus --output $model
fi

# While decoding, an adapter meets the target's own text.
step "own text: $own"
if [[ ! -e $own ]]; then
    $python recipes/continuations.py --model $model --corpus $corpus --output $own.part
    mv $own.part $own
fi

step "adapter: $adapter"
if [[ ! -e $adapter/report.json ]]; then
    resume=()
    if [[ -e $adapter/checkpoint/state.safetensors ]]; then resume=(--resume); fi
    kangaroo train adapter --model $model --data $own --exit-layer 1 --output $adapter \
        --steps "${ADAPTER_STEPS:-1200}" --batch-size 4 --sequence-length 512 --learning-rate 1e-2 --dtype bfloat16 \
        ${resume[@]+"${resume[@]}"}
fi

# Training recommends by a cost model; these are what benchmarks/decode_cpu.py measured as fast for this adapter.
$python -c 'import json, sys
config = json.load(open(sys.argv[1])) | {"gamma": 6, "eta": 0.15}
open(sys.argv[1], "w").write(json.dumps(config, indent=2) + "\n")' $adapter/config.json

# On the same text and as much of it as the adapter, so that the two can be compared.
step "Medusa heads: $medusa"
if [[ ! -e $medusa/report.json ]]; then
    resume=()
    if [[ -e $medusa/checkpoint/state.safetensors ]]; then resume=(--resume); fi
    kangaroo train medusa --model $model --data $own --num-heads 4 --output $medusa \
        --steps "${ADAPTER_STEPS:-1200}" --batch-size 4 --sequence-length 512 --learning-rate 1e-2 --dtype bfloat16 \
        ${resume[@]+"${resume[@]}"}
fi

step "draft model: $draft_model"
if [[ ! -e $draft_model/report.json ]]; then
    resume=()
    if [[ -e $draft_model/checkpoint/state.safetensors ]]; then resume=(--resume); fi
    $python recipes/draft_model.py --model $model --data $own --output $draft_model \
        --steps "${ADAPTER_STEPS:-1200}" ${resume[@]+"${resume[@]}"}
fi

step "skip list: $skips"
if [[ ! -e $skips/skip_layers.json ]]; then
    resume=()
    if [[ -d $skips ]]; then resume=(--resume); fi
    kangaroo search layers --model $model --data "${HUMANEVAL:-$own}" --limit 8 --sampler gp --output $skips \
        ${resume[@]+"${resume[@]}"}
fi

step "bundled: $installed"
mkdir -p $installed/{adapter,medusa,draft_model}
# install sets the mode, since safetensors are written for their owner alone.
install -m 644 $model/{config,generation_config,tokenizer,tokenizer_config}.json $model/model.safetensors $installed
install -m 644 $adapter/{config.json,adapter.safetensors,report.json} $installed/adapter
install -m 644 $medusa/{config.json,heads.safetensors,report.json} $installed/medusa
install -m 644 $draft_model/{config,generation_config,tokenizer,tokenizer_config,report}.json \
    $draft_model/model.safetensors $installed/draft_model
install -m 644 $skips/skip_layers.json $installed
install -m 644 $corpus/corpus.json $installed
install -m 644 $target/progress.json $installed/training.json

step "card: $installed/README.md"
problems=()
if [[ -n ${HUMANEVAL:-} ]]; then
    problems=(--problems "$HUMANEVAL")
else
    echo "HUMANEVAL is not set: the loss on it is not measured"
fi
$python recipes/card.py --corpus $corpus --state $target --model $model --adapter $adapter \
    --medusa $medusa --draft-model $draft_model --skips $skips ${problems[@]+"${problems[@]}"} --output $installed/README.md
