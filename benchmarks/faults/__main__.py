"""Faults × the commands that meet them, and kills: one line or the right result, nothing silent, nothing left.

    python -m benchmarks.faults                      a thousand cases, then forty kills
    python -m benchmarks.faults --all --kills 0      all cases
    python -m benchmarks.faults --all --list         the cases and what is right, without running any
    python -m benchmarks.faults --only 'labels.npy'  cases, and kills, whose name matches

In throw-away copies of a tiny workspace in which every stage has run. A case damages one thing, runs one command and
judges what it answers.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.faults import cases as kinds
from benchmarks.faults import files, inputs, kills, recorded, repository, running, surroundings, workspace
from benchmarks.faults.cases import COMMANDS, Case, Reference, Verdict
from benchmarks.faults.running import Job
from tasks.shared.operations.processes import signals


def every() -> Iterator[Case]:
    """All cases there are."""
    for module in (files, inputs, surroundings, recorded):
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


def kill_all(
    chosen: Sequence[kills.Kill], repo: Path, scratch: Path, home: Path, *, at_once: int, seed: int
) -> list[kills.Killed]:
    """Kill, and say what came of each as it ends."""
    ended = []
    for number, killed in enumerate(kills.Killer(repo, scratch, home, seed).run(chosen, at_once), 1):
        ended.append(killed)
        said = f"{killed.wrong or 'identical'}; {killed.seconds:.0f} s; first run: {killed.said}"
        print(f"{number}/{len(chosen)} {killed.kill.name}: {said[:600]}", file=sys.stderr, flush=True)
    return ended


def main() -> None:
    """Run what was asked for; status 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases and kills whose name matches")
    parser.add_argument(
        "--cases", type=int, default=1000, help="at most so many cases, evenly over all; 1000 by default"
    )
    parser.add_argument("--all", action="store_true", help="all cases")
    parser.add_argument("--kills", type=int, default=sum(kills.PLAN.values()), help="how many")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="commands at once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--list", action="store_true", help="print the cases and what is right, and run nothing")
    parser.add_argument("--table", type=Path, help="write all verdicts here (CSV)")
    arguments = parser.parse_args()
    chosen = listed(arguments.only, None if arguments.all else arguments.cases)
    planned = [kill for kill in kills.plan(arguments.kills, arguments.seed) if re.search(arguments.only, kill.name)]
    if arguments.list:
        print(*(f"{case.name}: {case.right}" for case in chosen), *(kill.name for kill in planned), sep="\n")
        return
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as in the background, which all that is started would inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="deepclust-faults-"))
        stack.callback(running.discard, scratch)
        stack.enter_context(signals.sigterm_exits())
        verdicts, killed = run(chosen, planned, scratch, arguments.jobs, arguments.seed)
    if arguments.table:
        with arguments.table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["fault", "command", "right", "verdict"])
            writer.writerows([each.case.fault, each.case.command, each.case.right, each.what] for each in verdicts)
            writer.writerows([each.kill.name, "", "identical", each.wrong or "identical"] for each in killed)
    sys.exit(int(any(not each.good for each in verdicts) or any(each.wrong for each in killed)))


def run(
    chosen: Sequence[Case], planned: Sequence[kills.Kill], scratch: Path, at_once: int, seed: int
) -> tuple[list[Verdict], list[kills.Killed]]:
    """Make the workspaces that are needed, run the cases, then the kills, and print what came of them."""
    begin = time.monotonic()
    tracking = any("DEEPCLUST_TRACKING" in case.variables for case in chosen)
    running.load(
        tracking=tracking,
        flows=any("flow" in case.command and not case.real for case in chosen),
    )
    home = scratch / "home"
    home.mkdir()
    bases = {name: scratch / name for name in ("whole", "cut", "repo")}
    workspace.build(bases["whole"], home, store=tracking)
    if any(case.base == "cut" for case in chosen):
        workspace.build_cut(bases["whole"], bases["cut"], home, surroundings.cut_off)
    if planned or any(case.base == "repo" for case in chosen):
        repository.build(bases["whole"], bases["repo"], home)
    print(f"workspaces: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    verdicts = []
    for verdict in judged(chosen, bases, home, scratch, at_once):
        verdicts.append(verdict)
        if not verdict.good:
            print(f"{verdict.what}: {verdict.case.name}: {verdict.line[:300]}", file=sys.stderr, flush=True)
    print(f"cases: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    killed = kill_all(planned, bases["repo"], scratch, home, at_once=at_once, seed=seed) if planned else []
    print(table(verdicts))
    if planned:
        print(f"\n{sum(not each.wrong for each in killed)} of {len(killed)} kills ended as an undisturbed run")
        print(*(f"- {each.kill.name}: {each.wrong}" for each in killed if each.wrong), sep="\n")
    print(f"\n{time.monotonic() - begin:.0f} s in all")
    return verdicts, killed


if __name__ == "__main__":
    main()
