#!/usr/bin/env bash
# DVC 3.67.1: one small output with `cache: false` keeps a whole stage out of the run cache, unless it stands under `plots:` or `metrics:`.
#
# Two stages do the same. Each writes a folder that is cached and a small CSV that is kept in git (`cache: false`): `first` lists the CSV
# under `outs:`, `second` under `plots:`. A parameter goes from 1 to 2 and back to 1.
# Expected: going back runs neither, since the folder's content for 1 is in the cache.
# Seen: `second` is restored ("is cached - skipping run"), `first` runs its command a third time, and DVC does not say why.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check 'dvc==3.67.1'
export PATH="$folder/venv/bin:$PATH" DVC_NO_ANALYTICS=1 DO_NOT_TRACK=1
mkdir work && cd work
dvc init --quiet --no-scm
cat >stage.sh <<'SH'
echo "$1" >>"../ran-$1"
mkdir -p "out-$1"
cp params.yaml "out-$1/result"
printf 'x,y\n0,1\n' >"$1.csv"
SH
cat >dvc.yaml <<'YAML'
stages:
  first:
    cmd: sh stage.sh first
    params: [value]
    outs: [out-first, first.csv: {cache: false}]
  second:
    cmd: sh stage.sh second
    params: [value]
    outs: [out-second]
    plots: [second.csv: {cache: false}]
YAML
for value in 1 2 1; do
  echo "value: $value" >params.yaml
  dvc repro --quiet
done
first=$(wc -l <../ran-first)
second=$(wc -l <../ran-second)
echo "the command ran $first times with the CSV under outs, $second times with it under plots"
[ "$first" = 3 ] && [ "$second" = 2 ]
