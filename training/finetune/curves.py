"""The curves of a run: losses, and the weights of each modality."""

from collections.abc import Sequence
from pathlib import Path

from modeling_dms.configuration.configuration_dms import MODALITIES


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
