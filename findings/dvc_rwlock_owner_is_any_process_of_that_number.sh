#!/usr/bin/env bash
# dvc 3.67.1: what a killed run has locked stays locked for a run in another container, whose processes have the same small numbers.
#
# `.dvc/tmp/rwlock` names who works on a path by process number and command. DVC removes an entry whose number belongs to no process, and
# heeds one whose number belongs to any, whatever that runs. In containers that share a workspace, numbers begin at 1 each time: the next
# container finds "its owner" alive, often itself or its own parent.
# Expected: an entry of `dvc repro` in a process that ended long ago does not stop the next run.
# Seen: with the number of an unrelated living process, `dvc repro` says that the path is busy and ends with status 255; with a number that
# nobody has, it says that there is a stale lock, and runs. `dvc repro --wait-for-lock`, made for a busy repository, does not wait here.
set -euo pipefail
folder=$(mktemp -d)
sleep 600 &
other=$!
trap 'kill $other; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'dvc==3.67.1'
export PATH="$folder/venv/bin:$PATH" DVC_NO_ANALYTICS=1
mkdir "$folder/repo" && cd "$folder/repo"
git init --quiet && dvc init --quiet
printf 'stages:\n  copy:\n    cmd: echo done > out\n    outs: [out]\n' >dvc.yaml

locked_by() {
  printf '{"write": {"%s/out": {"pid": %d, "cmd": "dvc repro"}}, "read": {}}' "$PWD" "$1" >.dvc/tmp/rwlock
}

locked_by $other
status=0
dvc --wait-for-lock repro >busy 2>&1 || status=$?
cat busy
[ $status = 255 ]
grep -q "'$PWD/out' is busy" busy
[ ! -e out ]

(exit 0) & gone=$!
wait $gone
locked_by $gone
dvc repro 2>&1 | tee stale
[ -e out ]
echo "busy by the number of any process: status $status; a number of nobody: runs"
