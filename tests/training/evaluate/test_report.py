"""Numbers and tables of what was found."""

from dataclasses import replace

import numpy as np
import pytest

from modeling_dms.training.evaluate.grid import Cell, Condition
from modeling_dms.training.evaluate.report import Results, render, summarize


CLEAN = Condition("clean", "clean")


def test_numbers_of_what_was_measured():
    """As if the others were not there: in means, in differences to static, and in what is clean."""
    fog, typos = Condition("image:fog", "unseen image", 5), Condition("text:typos", "unseen text", 5)
    some = np.array([True, False, True, True, False])
    scores = {
        (CLEAN, "static"): [1, 0, 1, 1, 0],
        (CLEAN, "rule"): [1, 0, 1, 1, 1],
        (fog, "static"): [0, 1, 0, 1, 1],
        (fog, "rule"): [1, 1, 0, 1, 1],
        (typos, "static"): [0, 0, 0, 1, 0],
        (typos, "rule"): [1, 0, 0, 1, 0],
    }
    cells, only = [], []
    for (condition, method), score in scores.items():
        weights = [[0.4, 0.6]] * 5
        whole = cell(method, condition, 0, score, weights, [0.9, 0.5, 0.8, 0.7, 0.6])
        if condition is typos:
            whole = replace(whole, measured=some, metrics={k: v * some for k, v in whole.metrics.items()})
        cells.append(whole)
        part = {name: values[some] for name, values in whole.metrics.items()}
        only.append(Cell(method, condition, 0, part, whole.weights[some], 0.5))
    numbers, expected = summarize(cells), summarize(only)
    found, wanted = ({(row["group"], row["method"]): row for row in of["groups"]} for of in (numbers, expected))
    for method in ("static", "rule"):
        row, other = found["unseen text", method], wanted["unseen text", method]
        for name in ("answers", "score", "aurc", "risk", "ece", "mcnemar"):
            assert row[name] == pytest.approx(other[name])
        assert row["minus_static"][0] == pytest.approx(other["minus_static"][0])
        assert found["unseen", method]["answers"] == 8
        assert found["unseen image", method]["answers"] == 5
    assert found["unseen", "rule"]["score"] == pytest.approx((4 + 2) / (5 + 3))
    assert found["unseen", "rule"]["minus_static"][0] == pytest.approx(2 / 8)
    assert found["unseen", "rule"]["minus_static"][1] >= 0
    assert numbers["against"]["minus"]["static"][0] == pytest.approx(2 / 8)
    (row,) = (row for row in numbers["robustness"] if row["method"] == "static")
    # clean: 3 of 5 for fog, 3 of 3 for typos
    assert row["relative_robustness"] == pytest.approx(np.mean([(3 / 5) / (3 / 5), (1 / 3) / (3 / 3)]))
    counts = {(row["condition"], row["method"]): row["samples"] for row in numbers["conditions"]}
    assert counts["text:typos", "rule"] == 3


def cell(method, condition, seed, score, weights=None, confidence=None):
    metrics = {"score": np.array(score, dtype=float)}
    if confidence is not None:
        metrics["confidence"] = np.array(confidence)
    return Cell(method, condition, seed, metrics, None if weights is None else np.array(weights), 0.5)


def test_numbers_by_hand():
    fog, typos = Condition("image:fog", "unseen image", 5), Condition("text:typos", "unseen text", 5)
    other = Condition("image:mismatch", "mismatch image", 5)
    away, towards = [[0.1, 0.9]] * 4, [[0.9, 0.1]] * 4
    half = [[0.5, 0.5]] * 4
    cells = [
        cell("static", CLEAN, 0, [1, 1, 1, 1], half),
        cell("rule", CLEAN, 0, [1, 1, 1, 1], [*half[1:], away[0]]),
        cell("static", fog, 0, [0, 0, 1, 1], half, [0.9, 0.8, 0.7, 0.6]),
        cell("rule", fog, 0, [0, 1, 1, 1], away, [0.6, 0.7, 0.8, 0.9]),
        cell("oracle", fog, 0, [1, 1, 1, 1], away, [0.6, 0.7, 0.8, 0.9]),
        cell("static", typos, 0, [0, 1, 1, 1], half, [0.5] * 4),
        cell("rule", typos, 0, [0, 1, 1, 1], towards, [0.5] * 4),
        cell("oracle", typos, 0, [0, 1, 1, 1], towards, [0.5] * 4),
        # what is sound but another sample's is told by other evidence
        cell("static", other, 0, [0, 0, 0, 0], half, [0.5] * 4),
        cell("rule", other, 0, [0, 0, 0, 0], towards, [0.5] * 4),
    ]
    numbers = summarize(cells)
    rows = {(row["group"], row["method"]): row for row in numbers["groups"]}
    assert rows["unseen image", "rule"]["gap_closed"][0] == pytest.approx(0.5)
    assert rows["unseen image", "rule"]["minus_static"][0] == pytest.approx(0.25)
    assert rows["unseen", "rule"]["score"] == pytest.approx(0.75)
    assert rows["unseen", "rule"]["conditions"] == 2
    assert rows["unseen text", "rule"]["gap_closed"] is None
    assert ("clean", "oracle") not in rows
    # the most confident answers are the wrong ones: worst possible order, against the best
    assert rows["unseen image", "static"]["aurc"] > rows["unseen image", "rule"]["aurc"]
    robust = {row["method"]: row for row in numbers["robustness"]}
    assert robust["rule"]["modality_auroc"] == 1
    assert robust["static"]["modality_auroc"] == 0.5
    assert (robust["static"]["clean_reweighted"], robust["rule"]["clean_reweighted"]) == (0, 1 / 4)
    assert robust["rule"]["mmi"] == pytest.approx(0.25)
    assert {row["method"]: row["ratio"] for row in numbers["cost"]} == {"static": 1, "rule": 1, "oracle": 1}
    with pytest.raises(ValueError, match="static"):
        Results([cell("rule", CLEAN, 0, [1])])


def test_reliability_orders_answers_as_a_confidence_does():
    trusted = cell("rule", CLEAN, 0, [0, 1, 1, 1])
    trusted.metrics["reliability"] = np.array([0.1, 0.2, 0.3, 0.4])
    cells = [cell("static", CLEAN, 0, [0, 1, 1, 1], None, [0.9, 0.2, 0.3, 0.4]), trusted]
    numbers = summarize(cells)
    static, rule = numbers["groups"]
    assert rule["aurc_reliability"] == pytest.approx(1 / 16)
    assert "aurc_reliability" not in static
    assert (static["risk"], rule["risk_reliability"]) == (1 / 4, 1 / 4)
    run = {"model": "m", "metric": "VQA accuracy", "command": "dms evaluate", "samples": 4, "split": "test"}
    run |= {"data": "d", "seeds": [0], "failed": {}, "chosen": {}}
    assert "risk at 80%, reliability" in render({"run": run, "results": numbers})
    assert "AURC, reliability" not in render({"run": run, "results": summarize(cells[:1])})


def test_no_error_of_a_metric_without_an_upper_end():
    fog = Condition("image:fog", "unseen image", 5)
    for highest, known in ((1, True), (2.5, False)):
        cells = [cell("static", CLEAN, 0, [highest, 0.2]), cell("static", fog, 0, [0.5, 0.1])]
        (row,) = summarize(cells)["robustness"]
        assert (row["mce"] is not None) == known
        assert row["relative_robustness"] > 0


def test_the_report_names_every_method_and_condition():
    cells = [
        cell(m, c, 0, [0, 1, 1])
        for m in ("static", "rule")
        for c in (CLEAN, Condition("image:fog", "unseen image", 5))
    ]
    run = {"model": "m", "metric": "VQA accuracy", "command": "dms evaluate", "samples": 3, "split": "test"}
    run |= {"data": "d", "seeds": [0], "failed": {"bad-7": "cannot be read"}}
    run |= {"chosen": {"static": {}, "VCD": {"alpha": 0.5, "beta": 0.1}}}
    text = render({"run": run, "results": summarize(cells)})
    for wanted in (
        "VCD: alpha 0.5, beta 0.1.",
        "| rule |",
        "image: fog",
        "bad-7",
        "1 sample(s) failed",
        "`dms evaluate`",
    ):
        assert wanted in text


def test_a_kind_by_itself_beside_its_group():
    """It has conditions of its own, which are no unseen ones: the errors of the group are those of the group."""
    fog, alone = Condition("image:fog", "unseen image", 5), Condition("image:fog", "image:fog", 5)
    jpeg = [Condition("image:jpeg", "unseen image", severity) for severity in (3, 5)]
    scores = {"static": [1, 0, 0, 1, 0], "rule": [1, 1, 0, 1, 0]}
    cells = [cell(method, c, 0, score) for method, score in scores.items() for c in (CLEAN, fog, *jpeg)]
    expected = summarize(cells)["robustness"]
    more = [*cells, *(cell(method, alone, 0, [0] * 5) for method in scores)]
    assert summarize(more)["robustness"] == expected
    assert expected[1]["mce"] == pytest.approx(2 / 3)
