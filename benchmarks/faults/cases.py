"""What a case is, which commands there are, and how an answer is judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults import workspace
from benchmarks.faults.running import LONGEST, Command, Ended
from benchmarks.faults.workspace import ENCODER, NEW

# What is right.
LINE = "line"  # status 2 and one line on stderr
SAME = "same"  # status 0, and the outputs of an undisturbed run
EITHER = "line or same"
DONE = "done"  # status 0; `check` may ask for more
ANSWER = "line or done"
SPOILT = "marker"  # a file that a shell would make of a name; it must not appear

GOOD = {LINE: {"line"}, SAME: {"same"}, EITHER: {"line", "same"}, DONE: {"done", "same"}}
GOOD[ANSWER] = GOOD[LINE] | GOOD[DONE]


COMMANDS: Mapping[str, Command] = {
    "prepare": Command(argv=["tasks.prepare"]),
    **{stage: Command(argv=[f"tasks.{stage}", ENCODER]) for stage in workspace.STAGES},
    "report": Command(argv=["tasks.report"]),
    "assign": Command(argv=["tasks.assign", "--encoder", ENCODER, NEW]),
    "register": Command(argv=["tasks.register", "--encoder", ENCODER]),
    "check": Command(argv=["tasks.params", "check"]),
    "show": Command(argv=["tasks.params", "show"]),
    "migrate": Command(argv=["tasks.params", "migrate"]),
    "overrides": Command(argv=["tasks.overrides", "embed.batch_size=500"]),
    "prune": Command(argv=["tasks.report.prune"]),
    "flow": Command(argv=["flows.pipeline"]),
    "flow stage": Command(argv=["flows.stage", "prepare"]),
}
TRACKED = {"DEEPCLUST_TRACKING": "on"}
_ENV: Mapping[str, Mapping[str, str]] = {"register": TRACKED}
_NOT_COUNTED = re.compile(r"warning: |skipped |[\w.-]+: +\d+%|\s*$|usage: |  +")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a command leaves where nothing is damaged: hashes of its outputs, and what it prints."""

    files: Mapping[str, str]
    out: str


Check = Callable[[Path, Ended, "Reference | None"], str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault met by one command.

    Attributes:
        fault: The kind, a colon, and what is wrong.
        command: A name of `COMMANDS`.
        make: Does the damage, in the workspace; may give variables for the environment.
        right: What the answer has to be.
        says: Regular expression that the one line has to match.
        argv: In place of the command's module and arguments.
        env: Variables that are added, or removed where None.
        limit: Most bytes of a file, as on a full disk.
        stdout: Where standard output goes.
        check: What is wrong with workspace and answer, compared with an undisturbed run's; or nothing.
        longest: Seconds that the answer may take.
        real: Whether Python is really started.
        base: Name of the workspace that is copied.
        loose: Whether more than one line is right, as of DVC and Prefect, which print their own too.
    """

    fault: str
    command: str
    make: Callable[[], dict[str, str] | None] = lambda: None
    right: str = LINE
    says: str = ""
    argv: Sequence[str] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    limit: int | None = None
    stdout: str | None = None
    check: Check | None = None
    longest: float = LONGEST
    real: bool = False
    base: str = "whole"
    loose: bool = False

    @property
    def name(self) -> str:
        """Fault and command."""
        return f"{self.fault} × {self.command}"

    @property
    def run(self) -> Command:
        """What is run."""
        return Command(argv=self.argv or COMMANDS[self.command].argv, real=self.real)

    @property
    def variables(self) -> dict[str, str | None]:
        """What is added to the environment."""
        return {**_ENV.get(self.command, {}), **self.env}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a case.

    Attributes:
        case: The case.
        what: `line`, `same` or `done`, or what is wrong in a word.
        seconds: Wall clock.
        line: The line that was printed, or what is wrong.
    """

    case: Case
    what: str
    seconds: float
    line: str

    @property
    def good(self) -> bool:
        """Whether that is right."""
        return self.what in GOOD[self.case.right]


def written(command: str) -> list[str]:
    """Where a command writes, relative to the workspace."""
    if command in ("prepare", "report"):
        return workspace.outputs(command)
    if command in workspace.STAGES:
        return workspace.outputs(command, ENCODER)
    return []


def refer(command: str, folder: Path, ended: Ended) -> Reference:
    """The reference, by a run in an undamaged workspace."""
    return Reference(files=workspace.hashes(folder / "work", written(command)), out=ended.out)


def judge(case: Case, folder: Path, ended: Ended, reference: Reference | None) -> Verdict:
    """What a command's end is worth."""
    lines = [line for line in ended.err.splitlines() if not _NOT_COUNTED.match(line)]
    first = lines[0] if lines else ""

    def verdict(what: str, line: str = "") -> Verdict:
        return Verdict(case=case, what=what, seconds=ended.seconds, line=line or first)

    said = ended.out + ended.err
    if ended.status is None:
        return verdict("hang", f"no end within {case.longest:g} s")
    if "Traceback (most recent call last)" in said:
        traced = said.rpartition("Traceback (most recent call last)")[2].strip().splitlines()
        return verdict("traceback", next((line for line in reversed(traced) if re.match(r"[\w.]+(:|$)", line)), ""))
    if ended.status < 0:
        return verdict("crash", f"signal {-ended.status}")
    if ended.left:
        return verdict("orphan", "; ".join(ended.left))
    if (folder / "work" / SPOILT).exists():
        return verdict("shell", "a name reached a shell")
    # The table on standard output is for other programs, which get every name as it is.
    shown = ended.err if case.command == "assign" else said
    if control := _CONTROL.search(shown.replace("\r", "\n")):
        return verdict("control", f"{control[0]!r} is printed: {first!r}")
    if left := workspace.half_written(folder):
        return verdict("left", ", ".join(left))
    if wrong := case.check(folder / "work", ended, reference) if case.check else "":
        return verdict("wrong", wrong)
    if ended.status == 0:
        return verdict(*_zero(case, folder, ended, reference))
    return verdict(*_refused(case, folder, ended, lines, reference))


def _zero(case: Case, folder: Path, ended: Ended, reference: Reference | None) -> tuple[str, str]:
    if reference:
        now = refer(case.command, folder, ended)
        files = sorted(name for name in reference.files if now.files.get(name) != reference.files[name])
        if not files and (reference.files or now.out == reference.out):
            return "same", ""
        if case.right in (SAME, EITHER):
            return "silent", f"other {', '.join(files) or 'answer'}"
    return ("silent", "taken without a word") if case.right in (LINE, SAME, EITHER) else ("done", "")


def _refused(
    case: Case, folder: Path, ended: Ended, lines: Sequence[str], reference: Reference | None
) -> tuple[str, str]:
    if not lines:
        return "silent", f"status {ended.status} without a line"
    if case.loose:
        own = [line for line in (ended.out + ended.err).splitlines() if re.search(r"\berror: ", line, re.IGNORECASE)]
        return ("line", own[-1]) if own else ("silent", f"status {ended.status}, and no error is named")
    if len(lines) > 1:
        return "lines", f"{len(lines)} lines: {lines[0]}"
    if not re.match(r"(python -m [\w.]+: )?error: ", lines[0]):
        return "form", lines[0]
    if ended.status != 2:
        return "status", f"{ended.status}: {lines[0]}"
    if case.says and not re.search(case.says, lines[0]):
        return "vague", lines[0]
    if reference:
        there = set((folder / "there").read_text(encoding="utf-8", errors="surrogateescape").splitlines())
        now = workspace.hashes(folder / "work", written(case.command))
        if gone := sorted(name for name in reference.files if name in there and name not in now):
            return "lost", f"its earlier outputs are gone: {', '.join(gone)}"
    return "line", lines[0]
