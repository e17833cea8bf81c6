#!/usr/bin/env bash
# DVC 3.67.1: a stage that is forced to run again leaves the damaged copy of its output in the cache, and the next restore brings it back.
#
# A bit of a cached file has rotted (here: its text is replaced, its mode stays read-only). DVC takes a read-only file of its cache for whole, so
# deleting the output and `dvc repro` restores the damage. The obvious remedy is `dvc repro --force`.
# Expected: that it also mends the cache, since the stage has just written the very file whose hash names the damaged one.
# Seen: the output is right until it is restored once more; then it is the damaged one again, and `dvc status` says that all is up to date.
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
    cmd: cp params.yaml out.txt
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
rm out.txt
dvc repro --quiet
again=$(cat out.txt)
status=$(dvc status)
echo "restored: $restored; forced: $forced; restored again: $again; status: $status"
[ "$restored" = damaged ] && [ "$forced" = 'value: 1' ] && [ "$again" = damaged ] && [[ $status == *'up to date'* ]]
