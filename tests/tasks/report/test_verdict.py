"""Which encoder is best, in words: by held-out labels, else by the agreement of clusterings, never by test labels."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import binomtest

from tasks.report import comparison, intervals, verdict

HELDOUT = "Best for this data, by kNN on held-out labelled training images: "
STABILITY = "Best for this data, by the agreement of clusterings over k-means seeds: "


def row(name: str, **values: Any) -> comparison.Row:
    return {"encoder": name, "method": name, "heldout_images": 1000, "rankme": 30.0, **values}


def stable(name: str, mean: float, std: float = 0.01, **values: Any) -> comparison.Row:
    return row(name, stability=mean, stability_std=std, **values)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (5, 5), (3, 10), (0, 400), (867, 1000), (5203, 6000)])
def test_the_interval_is_scipys(right: int, count: int) -> None:
    found = intervals.wilson(right / count, count)
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_clear_winner_on_held_out_labels_is_named_alone_whatever_the_test_labels_say() -> None:
    rows = [row("pixels", heldout=0.8, acc=0.9, knn20=0.99), row("swav", heldout=0.9, acc=0.1, knn20=0.1)]
    assert verdict.best(rows) == [f"{HELDOUT}swav .900 (.880–.917)."]


def test_those_whose_intervals_reach_that_of_the_best_are_no_different() -> None:
    rows = [row("pixels", heldout=0.8), row("pcl", heldout=0.88), row("swav", heldout=0.9), row("moco", heldout=None)]
    assert verdict.best(rows) == [
        f"{HELDOUT}swav .900 (.880–.917); no difference from pcl .880 (.858–.899).",
        "Not compared: moco (no held-out accuracy).",
    ]


def test_ties_at_the_top_are_no_difference() -> None:
    rows = [row("pixels", heldout=1.0), row("swav", heldout=1.0)]
    assert verdict.best(rows) == [
        f"{HELDOUT}no difference between pixels 1.000 (.996–1.000) and swav 1.000 (.996–1.000)."
    ]


def test_without_labels_the_agreement_of_clusterings_decides_and_is_called_a_hint() -> None:
    rows = [stable("pixels", 0.5), stable("swav", 0.8), stable("pcl", 0.79), stable("one", 0.99, rankme=1.0)]
    ranked, left_out, hint = verdict.best([*rows, row("moco")])
    assert ranked == f"{STABILITY}swav .800 (.790–.810); no difference from pcl .790 (.780–.800)."
    assert left_out == (
        "Not compared: one (RankMe 1.0: its features may have collapsed) and moco (fewer than three k-means seeds)."
    )
    assert hint.startswith("No labels are held out, so this is a hint and no proof")


def test_no_agreement_is_above_one() -> None:
    ranked, _ = verdict.best([stable("pixels", 0.99, 0.05), stable("swav", 0.97, 0.01)])
    assert ranked.endswith("no difference between pixels .990 (.940–1.000) and swav .970 (.960–.980).")


@pytest.mark.parametrize("missing", [None, "", float("nan")])
def test_what_is_not_measured_is_neither_best_nor_level(missing: Any) -> None:
    found = verdict.best([row("pixels", heldout=missing, stability=missing), row("swav", heldout=missing)])
    assert found[0].startswith(
        "Nothing says which encoder is best for this data: none has the agreement of clusterings"
    )
    (ranked, *_) = verdict.best([row("pixels", heldout=missing), row("swav", heldout=0.9)])
    assert (
        ranked == "There is nothing to compare swav with; kNN on held-out labelled training images: .900 (.880–.917)."
    )


def test_rows_of_the_csv_are_judged_like_those_of_the_metrics() -> None:
    rows = [row("pixels", heldout=0.8, acc=0.5), row("swav", heldout=0.9, acc=0.6)]
    texts = [{name: str(value) for name, value in each.items()} for each in rows]
    assert verdict.best(texts) == verdict.best(rows)
    assert verdict.on_test(texts) == verdict.on_test(rows)


def test_one_encoder_alone_is_compared_with_nothing() -> None:
    assert verdict.best([row("swav", heldout=0.9)]) == [
        "There is nothing to compare swav with; kNN on held-out labelled training images: .900 (.880–.917)."
    ]
    assert len(verdict.best([stable("swav", 0.8)])) == 1


def test_where_all_are_right_nobody_is_told_not_to_work() -> None:
    def perfect(name: str, acc: float) -> comparison.Row:
        return row(name, acc=acc, acc_std=0.0, knn20=1.0, linear=1.0)

    rows = [perfect("pixels", 1.0), perfect("random", 0.5), perfect("swav", 1.0)]
    assert verdict.on_test(rows) == ["swav and the baselines both reach 1.000 in cluster ACC, kNN 20 and linear."]
    assert verdict.on_test([perfect("pixels", 0.5), *rows[1:]])[-1] == (
        "swav beats pixels and random in cluster ACC; both reach 1.000 in kNN 20 and linear."
    )


def test_each_score_is_judged_by_itself() -> None:
    def row(name: str, knn: float | None, linear: float | None, acc: float | None = None) -> comparison.Row:
        return {"encoder": name, "method": name, "acc": acc, "acc_std": acc and 0.02, "knn20": knn, "linear": linear}

    rows = [row("pixels", 0.8, 0.8, 0.5), row("random", 0.7, 0.7, 0.3), row("moco", 0.75, 0.8, 0.4)]
    rows += [row("swav", 0.8, 0.9, 0.6), row("pcl", 0.9, 0.9, 0.51), row("simsiam", 0.6, 0.9, 0.2)]
    assert verdict.on_test(rows) == [
        "moco does NOT beat the baselines in cluster ACC (.400 ± .020 against .500 ± .020 of pixels), kNN 20 (.750 "
        "against .800 of pixels) and linear (.800 against .800 of pixels): it is not working on this data.",
        "swav beats pixels and random in cluster ACC and linear, but NOT in kNN 20 (.800 against .800 of pixels).",
        "pcl beats pixels and random in cluster ACC (by less than the deviation over seeds), kNN 20 and linear.",
        "simsiam beats pixels and random in linear, but NOT in cluster ACC (.200 ± .020 against .500 ± .020 of pixels "
        "and .300 ± .020 of random) and kNN 20 (.600 against .800 of pixels and .700 of random).",
    ]
    assert verdict.on_test(rows[1:3])[0].startswith("The baseline pixels is not in `encoders`")
    frozen = [row("pixels", 0.8, 0.8, 0.5), row("pretrained", 0.9, 0.9, 0.9)]
    assert verdict.on_test(frozen) == ["pretrained beats pixels in cluster ACC, kNN 20 and linear."], "no random net"
    assert "No test image has a label" in verdict.on_test([row("pixels", None, None), row("swav", None, None)])[0]
