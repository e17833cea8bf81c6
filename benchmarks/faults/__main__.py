"""Faults × the commands that meet them, and kills: one line or the right result, nothing silent, nothing left.

    python -m benchmarks.faults                     all cases, then all kills
    python -m benchmarks.faults --list              the cases and what is right, without running any
    python -m benchmarks.faults --only 'labels.npy' cases whose name matches
    python -m benchmarks.faults --cases 300 --kills 0

In throw-away copies of a tiny workspace in which every stage has run. A case damages one thing, runs one command and
judges what it answers.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.faults import cases as kinds
from benchmarks.faults import files, inputs, running, surroundings, workspace
from benchmarks.faults.cases import COMMANDS, Case, Reference, Verdict
from benchmarks.faults.running import Job


def every() -> Iterator[Case]:
    """All cases there are."""
    for module in (files, inputs, surroundings):
        yield from module.cases()


def listed(pattern: str, count: int | None) -> list[Case]:
    """The cases whose name matches; at most `count`, evenly over all."""
    found = [case for case in every() if re.search(pattern, case.name)]
    if count is None or count >= len(found):
        return found
    return [found[index * len(found) // count] for index in range(count)]


def references(base: Path, home: Path, scratch: Path, commands: Sequence[str], at_once: int) -> dict[str, Reference]:
    """What each command leaves where nothing is damaged.

    Raises:
        workspace.Failed: If one of them fails there.
    """
    jobs = {}
    for command in commands:
        folder = workspace.copy(base, scratch / f"reference-{command}")
        case = Case(fault="none", command=command)
        jobs[folder] = (command, Job(folder=folder, command=case.run, env=case.variables, longest=120))
    found = {}
    for job, ended in running.run([job for _, job in jobs.values()], at_once=at_once, home=home):
        command = jobs[job.folder][0]
        if ended.status:
            raise workspace.Failed(f"{command} ended with {ended.status} undisturbed: {ended.err or ended.out}")
        found[command] = kinds.refer(command, job.folder, ended)
        running.discard(job.folder)
    return found


def judged(
    chosen: Sequence[Case], bases: dict[str, Path], home: Path, scratch: Path, at_once: int
) -> Iterator[Verdict]:
    """Run the cases, and give each verdict as it comes."""
    commands = [name for name in COMMANDS if any(case.command == name for case in chosen)]
    known = references(bases["whole"], home, scratch, [name for name in commands if "flow" not in name], at_once)
    by_folder: dict[Path, Case] = {}

    def jobs() -> Iterator[Job]:
        for number, case in enumerate(chosen):
            folder = workspace.copy(bases[case.base], scratch / f"case-{number}")
            by_folder[folder] = case
            yield Job(
                folder=folder,
                command=case.run,
                before=case.make,
                env=case.variables,
                limit=case.limit,
                stdout=folder / "work" / case.stdout if case.stdout else None,
                longest=case.longest,
            )

    for job, ended in running.run(jobs(), at_once=at_once, home=home):
        case = by_folder.pop(job.folder)
        yield kinds.judge(case, job.folder, ended, known.get(case.command))
        running.discard(job.folder)


def table(verdicts: Sequence[Verdict]) -> str:
    """Numbers by verdict, and the cases that are not as they should be, in Markdown."""
    counts = Counter(verdict.what for verdict in verdicts)
    lines = [f"{len(verdicts)} cases: " + ", ".join(f"{what} {number}" for what, number in counts.most_common())]
    wrong = [verdict for verdict in verdicts if not verdict.good]
    if wrong:
        lines += ["", "| case | verdict | seconds | line |", "|---|---|---|---|"]
    for verdict in wrong:
        line = verdict.line[:160].replace("|", "\\|")
        lines.append(f"| {verdict.case.name} | {verdict.what} | {verdict.seconds:.1f} | {line} |")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for; status 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name matches")
    parser.add_argument("--cases", type=int, help="at most so many cases, evenly over all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="commands at once")
    parser.add_argument("--list", action="store_true", help="print the cases and what is right, and run nothing")
    parser.add_argument("--table", type=Path, help="write all verdicts here (CSV)")
    arguments = parser.parse_args()
    chosen = listed(arguments.only, arguments.cases)
    if arguments.list:
        for case in chosen:
            print(f"{case.name}: {case.right}")
        return
    begin = time.monotonic()
    running.load()
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="deepclust-faults-") as folder:
        scratch = Path(folder)
        home = scratch / "home"
        home.mkdir()
        bases = {"whole": scratch / "whole"}
        workspace.build(bases["whole"], home)
        print(f"a whole workspace, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if any(case.base == "cut" for case in chosen):
            bases["cut"] = scratch / "cut"
            workspace.build_cut(bases["whole"], bases["cut"], home, surroundings.cut_off)
        for verdict in judged(chosen, bases, home, scratch, arguments.jobs):
            verdicts.append(verdict)
            if not verdict.good:
                print(f"{verdict.what}: {verdict.case.name}: {verdict.line[:300]}", file=sys.stderr, flush=True)
    print(table(verdicts))
    print(f"\n{time.monotonic() - begin:.0f} s in all")
    if arguments.table:
        with arguments.table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["fault", "command", "right", "verdict"])
            writer.writerows([v.case.fault, v.case.command, v.case.right, v.what] for v in verdicts)
    sys.exit(int(any(not verdict.good for verdict in verdicts)))


if __name__ == "__main__":
    main()
