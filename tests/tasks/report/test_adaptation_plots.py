"""The report's section on adaptation: what it makes of the stage's tables, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.report import adaptation_plots as adaptation
from tasks.report import plots

Rows = list[dict[str, str]]
SOURCE, TENT, GUARDED = ("source", False), ("tent", False), ("tent", True)


def row(shift: str, adapter: str, error: float | None, *, guarded: int = 0, **other: Any) -> dict[str, str]:
    name, _, severity = shift.partition(" ")
    values = {"classifier": "linear", "setting": "reset", "batch_size": 8, "shift": name, "severity": severity or 0}
    values |= {"adapter": adapter, "guarded": guarded, "error": "" if error is None else error, "confidence": 0.5}
    values |= {"agreement": 0.25, "classes_used": 2.5} | other
    return {key: str(value) for key, value in values.items()}


def table(**other: Any) -> Rows:
    errors = {"sketch": (0.5, 0.55, 0.5), "fog 5": (0.4, 0.1, 0.39), "clean": (0.1, 0.9, 0.2)}
    errors |= {"snow 5": (0.3, 0.3, 0.2)}
    who = (("tent", 1), ("tent", 0), ("source", 0))
    every = [(shift, *each) for shift, found in errors.items() for each in zip(who, found, strict=True)]
    return [row(shift, adapter, error, guarded=guarded, **other) for shift, (adapter, guarded), error in every]


def heat_map(rows: Rows) -> Any:
    return adaptation.heat_map(*adaptation.groups(rows, ["snow", "fog"]))


def curve_of(stream: Rows) -> Any:
    return adaptation.curve(*adaptation.groups(stream, []), stream)


def batches(setting: str, *shifts: tuple[str, int]) -> list[tuple[str, bool, int, list[int]]]:
    """Segments of a stream of the source model: title, whether it is reset, start, images seen after each batch."""
    stream = [row(shift, "source", 0.5, images=seen, setting=setting) for shift, seen in shifts]
    segments = curve_of(stream).segments
    return [(part.title, part.begins, part.start, [seen for seen, _ in part.lines[SOURCE]]) for part in segments]


def test_the_map_is_in_the_reports_order_and_a_cell_is_the_error_its_colour_the_difference_from_source() -> None:
    heat = heat_map(table())
    assert [name for name, _ in heat.columns] == ["clean", "snow", "fog", "sketch", "mean of the shifts"]
    assert [rule for _, rule in heat.columns] == [False, True, False, True, True]
    assert [adaptation.name_of(who) for who in heat.lines] == ["source", "tent", "tent, guarded"]
    several = heat_map([row(shift, "source", 0.1) for shift in ("clean", "fog 5", "fog 1", "sketch")])
    assert [name for name, _ in several.columns][:-1] == ["clean", "fog 1", "fog 5", "sketch"]
    free = heat.lines[TENT]
    assert [cell.text for cell in free] == ["90.0", "30.0", "10.0", "55.0", "31.7"]
    full = f"{adaptation.STRONGEST:.2f}"
    assert free[0].colour == f"rgba({adaptation.WORSE}, {full})", "70 points worse: clipped"
    assert free[1].colour == f"rgba({adaptation.WORSE}, {adaptation.STRONGEST / 2:.2f})"
    assert free[2].colour == f"rgba({adaptation.BETTER}, {full})"
    assert {cell.colour for cell in heat.lines[SOURCE]} == {""}
    # (.5 + .39 + .2) / 3 and (.5 + .4 + .3) / 3: the clean images are in no mean
    assert [heat.lines[who][-1].text for who in (SOURCE, GUARDED)] == ["36.3", "40.0"]


def test_the_table_of_means_marks_the_best_and_leaves_out_what_failed() -> None:
    rows = [each for each in table() if (each["adapter"], each["guarded"]) != ("tent", "0")]
    names, means = adaptation.mean_table(adaptation.groups(rows + table(setting="mixed"), []))
    assert names == ["source", "tent"]
    assert means["linear, reset, 8"] == [
        adaptation.Mean(("36.3", ""), (True, False)),
        adaptation.Mean(("", "40.0"), (False, False)),
    ]
    assert means["linear, mixed, 8"][1] == adaptation.Mean(("31.7", "40.0"), (True, False))


def test_a_shift_without_labels_has_indicators_in_place_of_errors() -> None:
    photo = [row("photo", name, None, confidence=0.75) for name in ("source", "tent")]
    assert "photo" not in dict(heat_map(table() + photo).columns)
    (group,) = adaptation.groups(table() + photo, [])
    grids = adaptation.indicators(group)
    assert grids[0].columns == [("photo", False)]
    assert [grid.lines[TENT][0].text for grid in grids] == ["75.0", "25.0", "2.5"]
    assert grids[0].lines[GUARDED][0].text == "", "not measured: blank, not zero"
    (group,) = adaptation.groups(photo, [])
    assert adaptation.heat_map(group) is None
    assert adaptation.mean_table([group]) == ([], {})


def test_the_guard_is_summed_up_in_a_sentence() -> None:
    said = adaptation.guard_sentence({"worst": 0.05, "worst_setting": 0.0123, "right": 0.9756})
    assert "more than 1.2 points worse than source in any setting (worst single shift 5.0 points); on" in said
    assert "with 97.6 % of the images" in said
    said = adaptation.guard_sentence({"worst": 0.004, "worst_setting": -0.01, "right": None})
    assert said == "No guarded adapter was worse than source in any setting (worst single shift 0.4 points)."
    assert adaptation.guard_sentence({}) == ""


def test_a_stream_is_cut_where_the_shift_changes() -> None:
    afresh = batches("reset", ("clean", 8), ("clean", 16), ("fog 5", 8), ("tiny", 3))
    assert afresh == [("clean", True, 0, [8, 16]), ("fog", True, 16, [24]), ("tiny", True, 24, [27])]
    across = batches("continual", ("clean", 8), ("mixed", 16), ("fog 5", 24), ("fog 5", 32))
    assert across == [("clean", False, 0, [8, 16]), ("fog", False, 16, [24, 32])]
    assert batches("mixed", ("fog 5", 8), ("mixed", 16), ("clean", 24)) == [("", False, 0, [8, 16, 24])]


def test_a_line_is_a_running_mean_and_the_best_guarded_adapters_have_colours_of_their_own(tmp_path: Path) -> None:
    stream = [row("fog 5", "source", value, images=place) for place, value in enumerate([1.0] * 40 + [0.0] * 8)]
    (segment,) = curve_of(stream).segments
    assert [value for _, value in segment.lines[SOURCE]][-8:] == [share / 8 for share in range(7, -1, -1)]
    errors = {"source": 0.3, "bn": 0.5, "tent": 0.2, "tsd": 0.4, "lame": 0.1, "t3a": 0.3}
    rows = [row("$\\frac$", *each, guarded=guarded, images=8) for guarded in (0, 1) for each in errors.items()]
    curve = curve_of([each for each in rows if (each["adapter"], each["guarded"]) != ("source", "1")])
    assert {name for name, guarded in curve.segments[0].lines if guarded} == {"lame", "tent", "t3a"}
    figure = plots.stream(curve)
    lines = figure.legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(errors) + 3
    plots.save(figure, tmp_path / "stream.png")
