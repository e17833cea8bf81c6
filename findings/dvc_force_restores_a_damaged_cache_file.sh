#!/usr/bin/env bash
# DVC 3.67.1: where a file of the cache is damaged, `dvc repro --force` runs the command and then puts the damaged file in place of its output.
#
# A bit of a cached file has rotted (here: its text is replaced, its mode stays read-only). DVC takes a read-only file of its cache for whole, so
# deleting the output and `dvc repro` restores the damage. The obvious remedy is `dvc repro --force`.
# Expected: the file that the command has just written, and a mended cache: its hash is the name of the damaged one.
# Seen: the command runs, but what stands in the workspace afterwards is the damaged file. dvc.lock has the right hash, and `dvc status` says
# that all is up to date.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'dvc==3.67.1'
export DVC_NO_ANALYTICS=1 DVC_GLOBAL_CONFIG_DIR="$folder" DVC_SITE_CACHE_DIR="$folder/site"
mkdir "$folder/workspace"
cd "$folder/workspace"
dvc() { "$folder/venv/bin/dvc" "$@"; }
dvc init --quiet --no-scm
echo 'value: 1' > params.yaml
cat > dvc.yaml <<'YAML'
stages:
  copy:
    cmd: cp params.yaml out.txt; echo ran >> ran
    params: [value]
    outs: [out.txt]
YAML
dvc repro --quiet
hash=$(md5sum out.txt | cut -c1-32)
object=.dvc/cache/files/md5/${hash:0:2}/${hash:2}
chmod 644 "$object"
echo damaged > "$object"
chmod 444 "$object"
rm out.txt
dvc repro --quiet
restored=$(cat out.txt)
dvc repro --quiet --force
forced=$(cat out.txt)
status=$(dvc status)
runs=$(wc -l < ran)
echo "the command ran $runs times; restored: $restored; forced: $forced; status: $status"
[ "$restored" = damaged ] && [ "$runs" = 2 ] && [ "$forced" = damaged ] && [[ $status == *'up to date'* ]]
