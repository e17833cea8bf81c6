"""Names of classes, domains and files are text everywhere: no formula, no markup, and nothing for a terminal."""

from __future__ import annotations

import csv
import html
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from tasks.report import comparison, plots
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout, prepared
from tests.tasks import small_run

CLASSES = [r"$a$ $\frac{", "_x", "=1+1 |<b>%s {}`\n\x1b[2J\r"]
DOMAIN = r"$\frac{ <i>a:b|" + "\n\x1b]0;title\a"
SHOWN = [r"$a$ $\frac{", "_x", r"=1+1 |<b>%s {}`\n\x1b[2J\r"]


def test_a_pipeline_on_names_like_formulas_markup_and_commands_ends_with_a_report_that_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_run.build(tmp_path, count=48)
    overrides.apply(["encoders=[pixels]", "adapt.adapters=[source, t3a]", "cluster.other_k=[]", "data.max_skipped=.1"])
    for index, name in enumerate(CLASSES):
        Path(f"images/kind{index}").rename(Path("images", name))
    Path("images", CLASSES[2], "no\x1b[31m image.png").write_bytes(b"")
    for name in (*CLASSES, "no\x9b class"):
        Path("domains", DOMAIN, name).mkdir(parents=True)
    for path in list(Path("images", CLASSES[0]).iterdir())[:4]:
        for name in (CLASSES[0], "no\x9b class"):
            Path("domains", DOMAIN, name, path.name).write_bytes(path.read_bytes())
    small_run.run("prepare", monkeypatch)
    for stage in ("pretrain", "embed", "cluster", "linear", "adapt"):
        small_run.run(stage, monkeypatch, "pixels")
    small_run.run("report", monkeypatch)

    said = "".join(capfd.readouterr())
    assert [char for char in said if not char.isprintable() and char != "\n"] == []
    for line in (r"no\x1b[31m image.png: ", r"no\x9b class (4)", f"({', '.join(sorted(SHOWN))})"):
        assert line in said
    assert {path.split("/")[0] for path in prepared.load("train", "pixels").paths} == set(CLASSES), "tables keep names"
    with Path("artifacts/adapt/pixels/table.csv").open(encoding="utf-8", newline="") as file:
        assert DOMAIN in {row["shift"] for row in csv.DictReader(file)}
    report = layout.REPORT.read_text(encoding="utf-8")
    for name in (*SHOWN, r"no\x1b[31m image.png", r"$\frac{ <i>a:b|\n\x1b]0;title\x07"):
        assert html.escape(name).replace("&#x27;", "&#39;") in report
    assert {"map-pixels.png", "stream-pixels-0.png"} <= {path.name for path in layout.REPORT.parent.iterdir()}


def test_a_picture_shows_each_name_letter_by_letter_and_in_its_legend(recwarn: pytest.WarningsRecorder) -> None:
    names = [*CLASSES, r"\$x\$", "$", "猫", "long" * 50]
    figure = plots.embedding_map(np.eye(7, 2), np.arange(7), names, np.zeros(7, np.int64), 1)
    plots.save(figure, Path("/dev/null"))
    entries = [entry.get_text() for entry in figure.axes[0].get_legend().get_texts()]
    figure = plt.figure()
    for entry, name in zip(entries, [*SHOWN, r"\$x\$", "$", "猫", "long" * 14 + "lon…"], strict=True):
        as_name, as_text = figure.text(0, 0, entry), figure.text(0, 0, name, parse_math=False)
        assert as_name.get_window_extent().bounds == pytest.approx(as_text.get_window_extent().bounds)
    plt.close(figure)
    assert [str(warning.message) for warning in recwarn.list if "Glyph" not in str(warning.message)] == []


def test_a_cell_is_no_markdown() -> None:
    table = comparison.markdown([{"encoder": r"a|b<i>[c](d)`_e_\n", "acc": -0.5}])
    assert table.splitlines()[-1] == r"| a\|b\<i\>\[c\]\(d\)\`\_e\_\\n | -.500 |"
