"""The report's section on adaptation: what it makes of the stage's tables, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.report import adaptation_plots as adaptation
from tasks.report import plots

Rows = list[dict[str, str]]


def row(shift: str, adapter: str, error: float | None, *, guarded: int = 0, **other: Any) -> dict[str, str]:
    name, _, severity = shift.partition(" ")
    values = {"classifier": "linear", "setting": "reset", "batch_size": 8, "shift": name, "severity": severity or 0}
    values |= {"adapter": adapter, "guarded": guarded, "error": "" if error is None else error, "confidence": 0.5}
    values |= {"agreement": 0.25, "classes_used": 2.5} | other
    return {key: str(value) for key, value in values.items()}


def table(**other: Any) -> Rows:
    errors = {
        "sketch": (0.5, 0.55, 0.5),
        "fog 5": (0.4, 0.1, 0.39),
        "clean": (0.1, 0.9, 0.2),
        "snow 5": (0.3, 0.3, 0.2),
    }
    return [
        row(shift, adapter, error, guarded=guarded, **other)
        for shift, found in errors.items()
        for (adapter, guarded), error in zip((("tent", 1), ("tent", 0), ("source", 0)), found, strict=True)
    ]


def batch(shift: str, seen: int, error: float | None, adapter: str = "source", **other: Any) -> dict[str, str]:
    return row(shift, adapter, error, images=seen, **other)


def test_shifts_and_adapters_are_in_the_reports_order_whatever_that_of_the_table() -> None:
    (group,) = adaptation.groups(table(), ["snow", "fog"])
    heat = adaptation.heat_map(group)
    assert heat is not None
    assert [name for name, _ in heat.columns] == ["clean", "snow", "fog", "sketch", "mean of the shifts"]
    assert [rule for _, rule in heat.columns] == [False, True, False, True, True]
    assert [adaptation.name_of(who) for who in heat.lines] == ["source", "tent", "tent, guarded"]


def test_severities_are_named_where_there_are_several() -> None:
    rows = [row(shift, "source", 0.1) for shift in ("clean", "fog 5", "fog 1", "sketch")]
    (group,) = adaptation.groups(rows, ["fog"])
    heat = adaptation.heat_map(group)
    assert heat is not None
    assert [name for name, _ in heat.columns][:-1] == ["clean", "fog 1", "fog 5", "sketch"]


def test_a_cell_is_the_error_and_its_colour_the_difference_from_source() -> None:
    (group,) = adaptation.groups(table(), ["snow", "fog"])
    heat = adaptation.heat_map(group)
    assert heat is not None
    free = heat.lines["tent", False]
    assert [cell.text for cell in free] == ["90.0", "30.0", "10.0", "55.0", "31.7"]
    full = f"{adaptation.STRONGEST:.2f}"
    assert free[0].ground == f"rgba({adaptation.WORSE}, {full})", "70 points worse: clipped"
    assert free[1].ground == f"rgba({adaptation.WORSE}, {adaptation.STRONGEST / 2:.2f})"
    assert free[2].ground == f"rgba({adaptation.BETTER}, {full})"
    assert {cell.ground for cell in heat.lines["source", False]} == {""}
    # (.5 + .39 + .2) / 3 and (.5 + .4 + .3) / 3: the clean images are in no mean
    assert [heat.lines[who][-1].text for who in (("source", False), ("tent", True))] == ["36.3", "40.0"]


def test_the_table_of_means_marks_the_best_and_leaves_out_what_failed() -> None:
    rows = [each for each in table() if (each["adapter"], each["guarded"]) != ("tent", "0")]
    other = table(setting="mixed")
    seconds = [
        {"classifier": "linear", "setting": "mixed", "batch_size": "8", "adapter": "tent", "guarded": guarded}
        | {"seconds_per_image": value}
        for guarded, value in (("0", "0.00025"), ("1", "0.0123"))
    ]
    names, means = adaptation.mean_table(adaptation.groups(rows + other, []), seconds)
    assert names == ["source", "tent"]
    assert means["linear, reset, 8"] == [
        adaptation.Mean("36.3", "", ("", ""), (True, False)),
        adaptation.Mean("", "40.0", ("", ""), (False, False)),
    ]
    assert means["linear, mixed, 8"][1] == adaptation.Mean("31.7", "40.0", ("0.25", "12.3"), (True, False))


def test_a_shift_without_labels_is_told_of_by_signs_that_need_none() -> None:
    rows = [*table(), *(row("photo", name, None, confidence=0.75) for name in ("source", "tent"))]
    (group,) = adaptation.groups(rows, ["snow", "fog"])
    heat, (confidence, agreement, used) = adaptation.heat_map(group), adaptation.indicators(group)
    assert heat is not None
    assert "photo" not in dict(heat.columns)
    assert confidence.columns == [("photo", False)]
    cells = [grid.lines["tent", False][0].text for grid in (confidence, agreement, used)]
    assert cells == ["75.0", "25.0", "2.5"]
    assert confidence.lines["tent", True][0].text == "", "not measured: blank, not zero"


def test_without_any_label_there_is_no_heat_map_and_no_mean() -> None:
    (group,) = adaptation.groups([row(shift, "source", None) for shift in ("clean", "fog 5")], ["fog"])
    assert adaptation.heat_map(group) is None
    assert adaptation.mean_table([group], []) == ([], {})
    assert len(adaptation.indicators(group)) == len(adaptation.INDICATORS)


@pytest.mark.parametrize(
    ("guard", "sentence"),
    [
        (
            {"worst": 0.05, "worst_setting": 0.0123, "right": 0.9756},
            "No guarded adapter was more than 1.2 points worse than source in any setting (worst single shift 5.0 "
            "points); on batches with 97.6 % of the images, a guard's answer was no worse than both the adapter's own "
            "and the source model's.",
        ),
        (
            {"worst": 0.004, "worst_setting": -0.01, "right": None},
            "No guarded adapter was worse than source in any setting (worst single shift 0.4 points).",
        ),
        (
            {"worst": 0.004, "worst_setting": None, "right": None},
            "On the clean images, the only ones measured, no guarded adapter was more than 0.4 points worse than "
            "source.",
        ),
        ({}, ""),
    ],
)
def test_the_guard_is_summed_up_in_a_sentence(guard: dict[str, float | None], sentence: str) -> None:
    assert adaptation.guard_sentence(guard) == sentence


def test_long_streams_have_curves_and_else_those_begun_afresh() -> None:
    def drawn(*names: tuple[str, str]) -> list[tuple[str, str]]:
        rows = [row("clean", "source", 0.1, classifier=kind, setting=setting) for kind, setting in names]
        return [(group.classifier, group.setting) for group in adaptation.drawn(adaptation.groups(rows, []))]

    linear = [("linear", setting) for setting in ("reset", "mixed", "correlated", "continual")]
    assert drawn(*linear, ("clusters", "correlated"), ("clusters", "reset")) == [
        ("linear", "mixed"),
        ("linear", "continual"),
        ("clusters", "reset"),
    ]
    assert drawn(("linear", "correlated")) == [("linear", "correlated")]


def test_streams_begun_afresh_follow_one_another() -> None:
    stream = [batch(shift, seen, 0.5) for shift in ("clean", "fog 5") for seen in (8, 16)] + [batch("tiny", 3, 0.25)]
    (group,) = adaptation.groups(stream, [])
    curve = adaptation.curve(group, stream)
    assert curve is not None
    assert [(part.title, part.begins, part.start) for part in curve.segments] == [
        ("clean", True, 0),
        ("fog", True, 16),
        ("tiny", True, 32),
    ]
    who = ("source", False)
    assert [part.lines[who] for part in curve.segments] == [[(8, 0.5), (16, 0.5)], [(24, 0.5), (32, 0.5)], [(35, 0.25)]]


def test_streams_of_one_batch_each_are_told_apart() -> None:
    stream = [batch(shift, 8, 0.5) for shift in ("clean", "fog 5", "snow 5")]
    (group,) = adaptation.groups(stream, [])
    curve = adaptation.curve(group, stream)
    assert curve is not None
    assert [part.lines["source", False] for part in curve.segments] == [[(8, 0.5)], [(16, 0.5)], [(24, 0.5)]]


def test_one_long_stream_counts_on_and_a_batch_across_two_shifts_belongs_to_the_first() -> None:
    shifts = ("clean", "mixed", "fog 5", "fog 5")
    stream = [batch(shift, 8 * place, 0.5, setting="continual") for place, shift in enumerate(shifts, 1)]
    (group,) = adaptation.groups(stream, [])
    curve = adaptation.curve(group, stream)
    assert curve is not None
    assert [(part.title, part.begins, part.start) for part in curve.segments] == [
        ("clean", False, 0),
        ("fog", False, 16),
    ]
    assert [part.lines["source", False] for part in curve.segments] == [[(8, 0.5), (16, 0.5)], [(24, 0.5), (32, 0.5)]]


def test_a_mixed_stream_is_one_segment_even_where_a_batch_is_of_one_shift() -> None:
    stream = [
        batch(shift, 8 * place, 0.5, setting="mixed") for place, shift in enumerate(("fog 5", "mixed", "clean"), 1)
    ]
    (group,) = adaptation.groups(stream, [])
    curve = adaptation.curve(group, stream)
    assert curve is not None
    assert [(part.title, len(part.lines["source", False])) for part in curve.segments] == [("", 3)]


def test_the_running_mean_is_over_a_third_of_a_segment_and_eight_batches_at_most() -> None:
    def smoothed(values: list[float]) -> list[float]:
        stream = [batch("fog 5", place, value) for place, value in enumerate(values, 1)]
        (group,) = adaptation.groups(stream, [])
        curve = adaptation.curve(group, stream)
        assert curve is not None
        return [value for _, value in curve.segments[0].lines["source", False]]

    assert smoothed([0.0, 0.25, 1.0]) == [0.0, 0.25, 1.0]
    assert smoothed([0.0, 1.0, 0.0, 0.0, 0.5, 1.0]) == [0.0, 0.5, 0.5, 0.0, 0.25, 0.75]
    assert smoothed([1.0] * 40 + [0.0] * 8)[-8:] == [share / 8 for share in range(7, -1, -1)]


def test_only_the_best_guarded_adapters_are_lines() -> None:
    errors = {"bn": 0.5, "tent": 0.2, "tsd": 0.4, "lame": 0.1, "t3a": 0.3}
    rows = [row("fog 5", "source", 0.3, images=8)]
    rows += [
        row("fog 5", name, error, guarded=guarded, images=8) for name, error in errors.items() for guarded in (0, 1)
    ]
    (group,) = adaptation.groups(rows, [])
    curve = adaptation.curve(group, rows)
    assert curve is not None
    lines = list(curve.segments[0].lines)
    assert {name for name, guarded in lines if not guarded} == {"source", *errors}
    assert {name for name, guarded in lines if guarded} == {"lame", "tent", "t3a"}


def test_where_a_batch_has_no_error_the_curve_is_the_agreement_with_source() -> None:
    stream = [
        batch("fog 5", 8, None, name, guarded=guarded) for name, guarded in (("source", 0), ("tent", 0), ("tent", 1))
    ]
    (group,) = adaptation.groups(stream, [])
    curve = adaptation.curve(group, stream)
    assert curve is not None
    assert curve.label == "agreement with source"
    assert curve.segments[0].lines == {("tent", False): [(8, 0.25)]}
    assert adaptation.curve(group, stream[:1]) is None, "source alone agrees with itself"


def test_a_domains_name_is_no_formula_and_every_adapter_has_its_own_colour(tmp_path) -> None:
    stream = [batch(shift, 8, 0.5, name) for shift in ("$\\frac$", "b") for name in (*plots._ADAPTERS, "new")]
    (group,) = adaptation.groups(stream, [])
    curve = adaptation.curve(group, stream)
    assert curve is not None
    figure = plots.stream(curve)
    lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in lines}) == len(plots._ADAPTERS) + 1
    plots.save(figure, tmp_path / "stream.png")
