"""Pictures of an evaluation."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dms.configuration.configuration_dms import MODALITIES
from modeling_dms.training.evaluate.grid import Cell
from modeling_dms.training.evaluate.metrics.confidence import risk_coverage
from modeling_dms.training.evaluate.report import condition_means


# no two alike, static and the first DMS method first
METHOD_COLORS = (
    "#3b6fb6",
    "#d98324",
    "#4f9d69",
    "#a24a78",
    "#7a6fc4",
    "#5b5b5b",
    "#c0392b",
    "#16a0a0",
    "#b8a12f",
    "#8c564b",
    "#e377c2",
    "#111111",
)


def draw(results: dict[str, Any], cells: Sequence[Cell], out: Path, methods: Sequence[str]) -> list[Path]:
    """`severity.png`, `weights.png` and, where answers have a confidence, `reliability.png` and `risk.png`.

    Args:
        methods: the ones to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    means, written = condition_means(results["results"]["conditions"]), []
    colors = dict(zip(methods, METHOD_COLORS * len(methods), strict=False))
    sides = {
        side: sorted({k[2] for k in means if k[0].startswith(side) and k[1].startswith("unseen")})
        for side in ("image", "text")
    }
    sides = {side: severities for side, severities in sides.items() if severities}
    clean = next((of for key, of in means.items() if key[0] == "clean"), {})

    def over_severity(method: str, side: str, value: Callable[[dict], float | None]) -> tuple[list, list]:
        xs, ys = [], []
        for severity in (0, *sides[side]):
            keys = [k for k in means if k[0].startswith(side) and k[1].startswith("unseen") and k[2] == severity]
            found = [means[k][method] for k in keys if method in means[k]] or [clean.get(method)][: severity == 0]
            values = [v for f in found if f is not None and (v := value(f)) is not None]
            if values:
                xs.append(severity)
                ys.append(float(np.mean(values)))
        return xs, ys

    kinds: tuple[tuple[str, str, Callable[[dict], float | None]], ...] = (
        ("severity.png", results["run"]["metric"], lambda f: f["score"]),
        (
            "weights.png",
            f"mean weight of {MODALITIES[0]}",
            lambda f: None if f["weights"] is None else f["weights"][0],
        ),
    )
    for file, label, value in kinds:
        if not any(over_severity(method, side, value)[0] for method in methods for side in sides):
            continue
        figure, axes = pyplot.subplots(1, len(sides), figsize=(5.2 * len(sides), 4), squeeze=False, sharey=True)
        for axis, side in zip(axes[0], sides, strict=True):
            for method in methods:
                xs, ys = over_severity(method, side, value)
                if xs:
                    axis.plot(xs, ys, marker="o", label=method, color=colors[method], linewidth=1.6, markersize=4)
            axis.set_title(f"unseen {side} corruptions")
            axis.set_xlabel("severity (0: clean)")
            axis.set_xticks([0, *sides[side]])
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel(label)
        axes[0, -1].legend(fontsize=8, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
        figure.savefig(out / file, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        written.append(out / file)
    methods = methods[:2]  # more lines than these hide each other
    scored = [cell for cell in cells if "confidence" in cell.metrics and cell.method in methods]
    if scored:
        figure, axis = pyplot.subplots(figsize=(4.6, 4.2), layout="constrained")
        axis.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1)
        for method in methods:
            mine = [cell for cell in scored if cell.method == method]
            if not mine:
                continue
            confidence = np.concatenate([cell.metrics["confidence"][cell.measured] for cell in mine])
            right = np.concatenate([cell.metrics["score"][cell.measured] for cell in mine])
            bins = np.minimum((confidence * 10).astype(int), 9)
            kept = [b for b in range(10) if (bins == b).sum() >= 20]
            axis.plot(
                [confidence[bins == b].mean() for b in kept],
                [right[bins == b].mean() for b in kept],
                marker="o",
                markersize=4,
                linewidth=1.6,
                label=method,
                color=colors[method],
            )
        axis.set_xlabel("confidence (probability of the answer)")
        axis.set_ylabel(results["run"]["metric"])
        axis.set_title("reliability, all conditions")
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
        figure.savefig(out / "reliability.png", dpi=110)
        pyplot.close(figure)
        written += [out / "reliability.png", draw_risk(scored, out / "risk.png", colors)]
    return written


def draw_risk(cells: Sequence[Cell], file: Path, colors: Mapping[str, str]) -> Path:
    """Draws risk-coverage curves: by the probability of the answer and, where a method tells it, by reliability."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.6, 4.2), layout="constrained")
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = [cell for cell in cells if cell.method == method]
        right = np.concatenate([cell.metrics["score"][cell.measured] for cell in mine])
        for name, line in {"confidence": "--", "reliability": "-"}.items():
            if all(name in cell.metrics for cell in mine):
                told = np.concatenate([cell.metrics[name][cell.measured] for cell in mine])
                axis.plot(*risk_coverage(told, right), line, label=f"{method}, by {name}", color=colors[method])
    axis.set(xlabel="share of samples answered", ylabel="mean error", xlim=(0, 1), ylim=(0, None))
    axis.set_title("the most confident first, all conditions")
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file
