"""The pictures of a run: losses and weights over its steps, and what a calibration sees of damage."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_dms.configuration.configuration_dms import MODALITIES


if TYPE_CHECKING:
    from modeling_dms.calibrate.report import CalibrationReport

COLORS = {"vision": "#3b6fb6", "text": "#d98324"}


def draw_curves(history: Sequence[dict], path: Path) -> None:
    """Draws `Trainer`'s log history: each loss over the steps, and the mean and spread of the weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in history if "loss" in row]
    steps = [row["step"] for row in rows]
    names = sorted({name for row in rows for name in row if name.startswith("loss_")})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    left.plot(steps, [row["loss"] for row in rows], color="black", label="total", linewidth=1.8)
    for name in names:
        left.plot(steps, [row.get(name) for row in rows], label=name.removeprefix("loss_"), linewidth=1.2)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="Losses (unweighted parts)")
    left.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for name in MODALITIES:
        if not rows or f"weight_{name}" not in rows[0]:
            continue
        mean = [row[f"weight_{name}"] for row in rows]
        spread = [row[f"weight_{name}_spread"] for row in rows]
        right.plot(steps, mean, color=COLORS[name], label=name)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        right.fill_between(steps, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
    right.set(xlabel="step", ylabel="modality weight", ylim=(0, 1), title="Weights: mean and spread over samples")
    if right.lines:
        right.legend(fontsize=8, frameon=False)
    right.set_visible(bool(right.lines))  # a stage that aligns image tokens weighs nothing
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_detection(report: "CalibrationReport", path: Path) -> None:
    """Draws the shares of self-made damage that a calibration flags, by family and severity: as the detectors are, and
    with each family left out, which says what unknown damage meets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = [(name, families) for name, families in report.families.items() if families]
    height = 1.3 + 0.36 * sum(len(families) for _, families in sides) + 0.5 * len(sides)
    figure, axes = pyplot.subplots(
        max(1, len(sides)),
        2,
        figsize=(8.5, height),
        layout="constrained",
        squeeze=False,
        height_ratios=[len(families) for _, families in sides] or [1],
    )
    for (first, second), (name, families) in zip(axes, sides, strict=False):
        for axis, found, title in ((first, families, "known"), (second, report.unseen[name], "left out")):
            shares = [detection.flagged for detection in found.values()]
            axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            for row, line in enumerate(shares):
                for column, share in enumerate(line):
                    color = "white" if share > 0.6 else "black"
                    axis.text(column, row, f"{share:.2f}", ha="center", va="center", color=color, fontsize=8)
            axis.set_xticks(range(len(shares[0])), range(1, len(shares[0]) + 1))
            axis.set_yticks(range(len(found)), [kind.replace("_", " ") for kind in found])
            axis.tick_params(length=0)
            axis.set(title=f"{name}, the family is {title}", xlabel="severity")
    for axis in axes[len(sides) :].flat:  # clean statistics alone
        axis.set_visible(False)
    figure.suptitle(f"Share of damaged inputs flagged, where {report.false_alarm_rate:.1%} of clean ones may be")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
