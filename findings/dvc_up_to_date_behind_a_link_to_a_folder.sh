#!/usr/bin/env bash
# DVC 3.67.1: a stage that depends on a folder stays up to date when files change behind a symbolic link to a folder in it.
#
# A link farm is a usual way to make one data set of several without copying: `farm/cats` is a link to `store/cats`, and `farm` is a dependency.
# Expected: that the stage has to run again, as it does where `farm/cat.txt` is a link to a file, whose content DVC hashes; or an error.
# Seen: DVC does not list what is behind the link, so a new file there changes nothing, and `dvc status` says that all is up to date.
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
cat > dvc.yaml <<'YAML'
stages:
  count:
    cmd: find -L farm -type f | wc -l > count.txt
    deps: [farm]
    outs: [count.txt]
YAML
mkdir -p farm store/cats
echo 1 > store/cats/1.txt
echo 1 > store/dog.txt
ln -s ../store/cats farm/cats
ln -s ../store/dog.txt farm/dog.txt
dvc repro --quiet
echo "files that the command saw: $(cat count.txt)"
echo 2 > store/cats/2.txt
behind_a_folder=$(dvc status)
echo "a new file behind the link to a folder: $behind_a_folder"
echo 2 > store/dog.txt
behind_a_file=$(dvc status --json)
echo "another content behind the link to a file: $behind_a_file"
[[ $(cat count.txt) == 2 ]]
[[ $behind_a_folder == "Data and pipelines are up to date." ]]
[[ $behind_a_file == '{"count": [{"changed deps": {"farm": "modified"}}]}' ]]
echo "as described: what is behind a link to a folder is not seen"
