"""Numbers and tables of an evaluation."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from modeling_dms.training.evaluate.documents import points, share, table
from modeling_dms.training.evaluate.grid import ORACLE, Cell, Condition
from modeling_dms.training.evaluate.metrics.confidence import aurc, expected_calibration_error, risk_at
from modeling_dms.training.evaluate.metrics.robust import (
    bootstrap_interval,
    mcnemar,
    mean_corruption_error,
    modality_auroc,
    multimodal_impact,
    oracle_gap_closed,
    relative_robustness,
)


STATIC = "static"
COVERAGE = 0.8  # share of samples answered at which the risk is told
# of its table, by their names in results; older results lack some
ROBUSTNESS = {
    "mmi": "MMI",
    "relative_robustness": "relative robustness",
    "mce": "mCE (static = 1)",
    "clean_reweighted": "clean samples whose weights are not uniform",
    "modality_auroc": "weights tell the damaged modality: AUROC",
}
# of samples that have several images or passages, see `weighed`
SOURCES = {
    "reweighted": "weights not equal",
    "damaged_weight": "mean weight of what is damaged",
    "damaged_lowest": "it weighs less than all else",
}
DMS = ("own", "rule", "learned")  # the first one that was run is compared with all others


class Results:
    """The cells of a grid, as arrays by method and group.

    Raises:
        ValueError: without cells of the static method.
    """

    def __init__(self, cells: Sequence[Cell]):
        self.cells = list(cells)
        self.methods = list(dict.fromkeys(cell.method for cell in cells))
        self.conditions = list(dict.fromkeys(cell.condition for cell in cells))
        self.groups = list(dict.fromkeys(condition.group for condition in self.conditions))
        if STATIC not in self.methods:
            raise ValueError(f"there is no method {STATIC!r} to compare with, only {', '.join(self.methods)}")

    def chosen(self, method: str, wanted: Callable[[Condition], bool]) -> list[Cell]:
        """Cells of a method, in the order of conditions and seeds."""
        return [cell for cell in self.cells if cell.method == method and wanted(cell.condition)]

    def array(self, method: str, wanted: Callable[[Condition], bool], metric: str = "score") -> np.ndarray:
        """(conditions and seeds, n)."""
        return np.stack([cell.metrics[metric] for cell in self.chosen(method, wanted)])

    def measured(self, method: str, wanted: Callable[[Condition], bool]) -> np.ndarray:
        """(conditions and seeds, n): 1 where a sample was measured, 0 where its metrics are 0 instead."""
        return np.stack([cell.measured for cell in self.chosen(method, wanted)]).astype(float)


def _mean(values: np.ndarray, measured: np.ndarray) -> float:
    """Over what was measured; values are 0 elsewhere."""
    return float(values.sum() / measured.sum()) if measured.any() else float("nan")


def _difference(one: np.ndarray, other: np.ndarray, measured: np.ndarray) -> tuple[float, float, float]:
    """Paired, of two methods on the same samples: the mean and its interval."""
    return _mean(one - other, measured), *bootstrap_interval(_mean, one - other, measured)


def is_unseen(condition: Condition) -> bool:
    """Whether neither training nor calibration saw its family, conflicts apart."""
    return condition.group.startswith("unseen")


def _is_in(group: str, condition: Condition) -> bool:
    return condition.group == group


def summarize(cells: Sequence[Cell]) -> dict[str, Any]:
    """Every number of the report, as plain Python values."""
    results = Results(cells)
    groups: dict[str, Callable[[Condition], bool]] = {
        group: functools.partial(_is_in, group) for group in results.groups
    }
    if sum(group.startswith("unseen") for group in groups) > 1:
        groups["unseen"] = is_unseen
    rows = [
        row
        for group, wanted in groups.items()
        for method in results.methods
        if (row := _group_row(results, group, method, wanted)) is not None
    ]
    return {
        "groups": rows,
        "conditions": [_condition_row(cell) for cell in results.cells],
        "robustness": [row for method in results.methods if (row := _robustness_row(results, method)) is not None],
        "cost": _costs(results),
        "against": _against(results),
    }


def _against(results: Results) -> dict[str, Any] | None:
    """DMS minus every other method on all unseen conditions together, and the change on clean samples."""
    dms = next((name for name in DMS if name in results.methods), None)
    if dms is None or not results.chosen(dms, is_unseen):
        return None
    own, measured = results.array(dms, is_unseen), results.measured(dms, is_unseen)
    others = [m for m in results.methods if m != dms and m != ORACLE and results.chosen(m, is_unseen)]
    clean = functools.partial(_is_in, "clean")
    return {
        "dms": dms,
        "minus": {m: _difference(own, results.array(m, is_unseen), measured) for m in others},
        "clean": _difference(results.array(dms, clean), results.array(STATIC, clean), results.measured(dms, clean)),
    }


def _group_row(results: Results, group: str, method: str, wanted: Callable) -> dict[str, Any] | None:
    """A method on a group of conditions, against static and oracle."""
    if not results.chosen(method, wanted):  # the oracle has no clean condition
        return None
    static, own = results.array(STATIC, wanted), results.array(method, wanted)
    measured = results.measured(method, wanted)
    some = measured > 0
    row: dict[str, Any] = {
        "group": group,
        "method": method,
        "conditions": len({cell.condition for cell in results.chosen(method, wanted)}),
        "answers": int(measured.sum()),
        "score": _mean(own, measured),
        "interval": bootstrap_interval(_mean, own, measured),
        "minus_static": _difference(own, static, measured),
        "gap_closed": None,
    }
    if results.chosen(ORACLE, wanted):
        triple = (static, own, results.array(ORACLE, wanted))
        if triple[2].sum() > triple[0].sum():
            row["gap_closed"] = (oracle_gap_closed(*triple), *bootstrap_interval(oracle_gap_closed, *triple))
    if len(own) == 1 and np.isin([own, static], (0, 1)).all():
        row["mcnemar"] = mcnemar(own[some], static[some])
    if "confidence" in results.chosen(method, wanted)[0].metrics and np.isin(own, (0, 1)).all():
        confidence = results.array(method, wanted, "confidence")
        row["aurc"] = aurc(confidence[some], own[some])
        row["risk"] = risk_at(COVERAGE, confidence[some], own[some])
        row["ece"] = expected_calibration_error(confidence[some], own[some])
    for name in SOURCES:
        if name in results.chosen(method, wanted)[0].metrics:
            row[name] = _mean(results.array(method, wanted, name), measured)
    if "reliability" in results.chosen(method, wanted)[0].metrics and np.isin(own, (0, 1)).all():
        trust = results.array(method, wanted, "reliability")
        row["aurc_reliability"] = aurc(trust[some], own[some])
        row["risk_reliability"] = risk_at(COVERAGE, trust[some], own[some])
    return row


def _condition_row(cell: Cell) -> dict[str, Any]:
    return {
        "condition": cell.condition.name,
        "group": cell.condition.group,
        "severity": cell.condition.severity,
        "seed": cell.seed,
        "method": cell.method,
        "samples": int(cell.measured.sum()),
        **{name: cell.mean(name) for name in cell.metrics},
        "weights": None if cell.weights is None else cell.weights[cell.measured].mean(0).tolist(),
    }


def _robustness_row(results: Results, method: str) -> dict[str, Any] | None:
    """Published robustness measures over unseen conditions, and whether the weights tell what is damaged."""
    clean = results.chosen(method, lambda c: c.group == "clean")
    unseen = results.chosen(method, is_unseen)
    if not clean or not unseen:
        return None
    measured = {(cell.condition, cell.seed): cell.measured for cell in unseen}
    names = list(dict.fromkeys(cell.condition.name for cell in unseen))

    def level(cell: Cell) -> float:
        """Of the same samples when they are clean."""
        return float(np.mean([c.metrics["score"][measured[cell.condition, c.seed]].mean() for c in clean]))

    def errors(of: str) -> np.ndarray:
        """Of each kind, the sum over severities and seeds."""
        cells = results.chosen(of, is_unseen)
        return np.array([sum(1 - cell.mean() for cell in cells if cell.condition.name == name) for name in names])

    levels, scores = np.array([level(cell) for cell in unseen]), np.array([cell.mean() for cell in unseen])
    # an error is what is missing to 1, of a metric that ends there: CIDEr does not
    bounded = all(cell.metrics["score"].max() <= 1 for cell in results.cells)
    row: dict[str, Any] = {
        "method": method,
        "mmi": multimodal_impact(levels, scores) if levels.all() else None,
        "relative_robustness": float(relative_robustness(levels, scores).mean()) if levels.all() else None,
        "mce": mean_corruption_error(errors(method), errors(STATIC)) if bounded and errors(STATIC).all() else None,
        "clean_reweighted": None,
        "modality_auroc": None,
    }
    if all(cell.weights is not None for cell in clean):
        weights = np.concatenate([cell.weights[cell.measured] for cell in clean])
        row["clean_reweighted"] = float((np.ptp(weights, axis=1) > 1e-3).mean())
    elif all("reweighted" in cell.metrics for cell in clean):
        row["clean_reweighted"] = float(np.mean([cell.mean("reweighted") for cell in clean]))
    damaged = [cell for cell in unseen if cell.condition.damaged is not None]
    sides = [
        [
            cell.weights[cell.measured, 0]
            for cell in damaged
            if cell.weights is not None and cell.condition.damaged == side
        ]
        for side in (0, 1)
    ]
    if all(sides):
        vision = [np.concatenate(parts) for parts in sides]
        own = np.repeat([True, False], [len(part) for part in vision])
        row["modality_auroc"] = modality_auroc(np.concatenate(vision), own)
    return row


def _costs(results: Results) -> list[dict[str, Any]]:
    """Milliseconds a sample, and the ratio to static on the same conditions."""
    rows = []
    for method in results.methods:
        own = results.chosen(method, lambda c: True)
        static = [cell for c in own for cell in results.chosen(STATIC, lambda k, c=c: k == c.condition)]
        static = [cell for cell in static if cell.seed in {c.seed for c in own}]
        seconds = {cell.seconds for cell in own}
        count = sum(int(cell.measured.sum()) for cell in own)
        reference = sum(cell.seconds for cell in {id(cell): cell for cell in static}.values())
        rows.append(
            {
                "method": method,
                "milliseconds": 1000 * sum(cell.seconds for cell in own) / count,
                "ratio": sum(cell.seconds for cell in own) / reference if seconds and reference else None,
            }
        )
    return rows


# ---- tables


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def render(results: dict[str, Any]) -> str:
    """The report as Markdown, from what `summarize` made and `evaluate` said of the run."""
    run, numbers = results["run"], results["results"]
    parts = [
        f"# {run['model']}: {run['metric']}",
        f"Written by `{run['command']}`. {run['samples']} samples of the {run['split']} split of `{run['data']}`, "
        f"{len(run['seeds'])} seed(s) of corruptions and questions. Intervals are 95% bootstrap over samples; "
        "*- static* is the paired difference in points. *Gap closed* is the pooled share of what the oracle gains, "
        "which is told the damaged modality and takes the best of the weights 0.05, 0.01 and 0 for it; resamples in "
        "which it gains nothing are left out of the interval.",
    ]
    if run["failed"]:
        parts.append(
            f"{len(run['failed'])} sample(s) failed: those that cannot be read, asked or scored are left out, those "
            f"that could not be corrupted count as wrong for every method: {', '.join(run['failed'])}."
        )
    if run.get("left_out"):  # results of version 0.1 do not say
        parts.append(
            f"{len(run['left_out'])} sample(s) left out of training, calibration and validation, or repeated."
        )
    if run.get("conditions_left_out"):
        shown = "; ".join(f"{name}: {why}" for name, why in run["conditions_left_out"].items())
        parts.append(f"Conditions left out, since no sample can be measured under them: {shown}.")
    chosen = {name: choice for name, choice in run["chosen"].items() if choice}
    if chosen:
        shown = "; ".join(f"{n}: {', '.join(f'{k} {v}' for k, v in of.items())}" for n, of in chosen.items())
        parts.append(f"Chosen on validation or training data: {shown}.")
    for group in dict.fromkeys(row["group"] for row in numbers["groups"]):
        rows = [row for row in numbers["groups"] if row["group"] == group]
        told, body = any("aurc_reliability" in row for row in rows), []
        for row in rows:
            low, high = row["interval"]
            gap = None if row["method"] in (STATIC, ORACLE) else row["gap_closed"]
            body.append(
                [
                    row["method"],
                    f"{row['score']:.3f} [{low:.3f}, {high:.3f}]",
                    "-" if row["method"] == STATIC else points(row["minus_static"]),
                    share(gap),
                    *(_number(row.get(name)) for name in ("aurc", "risk", "ece")),
                    *(_number(row.get(name)) for name in ("aurc_reliability", "risk_reliability") if told),
                ]
            )
        risk = f"risk at {COVERAGE:.0%}"
        head = ("method", run["metric"], "- static, points", "gap closed", "AURC", risk, "ECE")
        head += ("AURC, reliability", f"{risk}, reliability") if told else ()
        parts.append(f"## {group}: {rows[0]['conditions']} condition(s)\n\n{table(head, body)}")
    if numbers["against"] is not None:
        dms, minus, clean = (numbers["against"][name] for name in ("dms", "minus", "clean"))
        better = [name for name, (mean, _, _) in minus.items() if mean > 0]
        clear = [name for name in better if minus[name][1] > 0]
        parts.append(
            f"## `{dms}` against the others, all unseen corruptions\n\n"
            f"More accurate than {len(better)} of {len(minus)} methods, than {len(clear)} of them with an interval "
            f"above 0; on clean samples {points(clean)} points against static.\n\n"
            + table(("method", f"`{dms}` - method, points"), [[name, points(of)] for name, of in minus.items()])
        )
    if told := [row for row in numbers["groups"] if "reweighted" in row and row["method"] not in (STATIC, ORACLE)]:
        body = [[row["group"], row["method"], *(_number(row.get(name)) for name in SOURCES)] for row in told]
        parts.append(
            "## Several sources\n\nEach corruption damages one of a sample's images or passages, joined ones several; "
            "the oracle is told which. A weight of 1 is an equal share.\n\n"
            + table(("inputs", "method", *SOURCES.values()), body)
        )
    if numbers["robustness"]:
        body = [[row["method"], *(_number(row.get(name)) for name in ROBUSTNESS)] for row in numbers["robustness"]]
        head = ("method", *ROBUSTNESS.values())
        parts.append(f"## Robustness on unseen corruptions\n\n{table(head, body)}")
    body = [[row["method"], _number(row["milliseconds"], 2), _number(row["ratio"], 2)] for row in numbers["cost"]]
    parts.append(
        "## Cost\n\nEncoding, deciding and answering, in batches; measured beside each other, but for what `--resume` "
        "took over from a run before. A method that tells how far its answers can be relied on reads a prompt with "
        "its weights for that, and again to answer; in use that is one reading.\n\n"
        + table(("method", "ms a sample", "of static"), body)
    )
    means = condition_means(numbers["conditions"])
    methods = list(dict.fromkeys(row["method"] for row in numbers["conditions"]))
    counts = {(row["condition"], row["severity"]): row["samples"] for row in numbers["conditions"]}
    some = {key: f" ({count} of {run['samples']})" for key, count in counts.items() if count < run["samples"]}
    body = [
        [
            name.replace(":", ": ").replace("_", " ") + some.get((name, severity), ""),
            group,
            str(severity or "-"),
            *(_number(of.get(method, {}).get("score")) for method in methods),
        ]
        for (name, group, severity), of in means.items()
    ]
    note = "In brackets: the samples that a condition changes, where these are not all.\n\n" if some else ""
    parts.append(f"## Conditions\n\n{note}{table(('corrupted', 'group', 'severity', *methods), body)}")
    return "\n\n".join(parts) + "\n"


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluation wrote.

    Args:
        path: the file `results.json`, or its folder.

    Raises:
        FileNotFoundError, ValueError: if it is none, naming the file.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: expected a folder that `dms evaluate` wrote")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not (isinstance(read, dict) and {"run", "results"} <= read.keys() and "groups" in read["results"]):
        raise ValueError(f"{file} was not written by `dms evaluate`")
    return read


def combine(folders: Sequence[Path], out: Path) -> None:
    """One document from the `results.json` of several evaluations, with their pictures.

    Args:
        folders: that `dms evaluate` wrote.

    Raises:
        FileNotFoundError, ValueError: for a folder without results.
    """
    evaluations = [read_results(folder) for folder in folders]
    parts = ["# Results", "Written by `dms report` from " + ", ".join(f"`{f}/results.json`" for f in folders) + "."]
    for folder, results in zip(folders, evaluations, strict=True):
        parts.append(render(results).replace("\n#", "\n##").replace("# ", "## ", 1).strip())
        pictures = sorted(folder.glob("*.png"))
        places = [quote(Path(os.path.relpath(picture, out.parent)).as_posix()) for picture in pictures]
        parts += [f"![{picture.stem}]({place})" for picture, place in zip(pictures, places, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def condition_means(rows: Sequence[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """By condition and method: means over seeds."""
    found: dict[tuple, dict[str, list]] = {}
    for row in rows:
        key = (row["condition"], row["group"], row["severity"])
        found.setdefault(key, {}).setdefault(row["method"], []).append(row)
    return {
        key: {
            method: {
                "score": float(np.mean([row["score"] for row in of])),
                "weights": None if of[0]["weights"] is None else np.mean([row["weights"] for row in of], 0).tolist(),
            }
            for method, of in methods.items()
        }
        for key, methods in found.items()
    }
