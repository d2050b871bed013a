"""A sheet of samples: image, context, question, answers, and the modality weights as bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling_dms.training.data import Sample


@dataclass
class Panel:
    """One sample of a sheet.

    Attributes:
        title: the corruption's name.
        answers: by method, what it said and whether that is right.
        weights: of image and context.
    """

    title: str
    sample: Sample
    answers: dict[str, tuple[str, bool]]
    weights: Sequence[float]


def draw_sheet(path: Path, panels: Sequence[Panel], columns: int = 8) -> None:
    """Draws panels side by side, so many in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        2 * rows,
        columns,
        figsize=(2.1 * columns, 5.0 * rows),
        height_ratios=(1, 0.45) * rows,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)[len(panels) :].flat:
        axis.axis("off")
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        image = panel.sample.load_image()
        top, bottom = axes[2 * row : 2 * row + 2, column]
        if image is not None:
            top.imshow(image)
        top.set_box_aspect(1 if image is None else None)
        top.set_xticks([])
        top.set_yticks([])
        top.set_title(
            panel.title.replace(":", ": ").replace("_", " ").replace("+", "\n"), fontsize=11, fontweight="bold"
        )
        said = [f"{name}: {said} ({'right' if right else 'wrong'})" for name, (said, right) in panel.answers.items()]
        context = f"“{_wrapped(panel.sample.context or 'no context')}”"
        top.set_xlabel("\n".join([context, _wrapped(panel.sample.question), *said]), fontsize=8.5)
        bars = bottom.barh(["image", "context"], panel.weights, color=["#3b6fb6", "#d98324"])
        bottom.bar_label(bars, [f"{weight:.2f}" for weight in panel.weights], fontsize=9, padding=3)
        bottom.set_xlim(0, 1.3)
        bottom.invert_yaxis()
        bottom.axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
        bottom.set_xticks([0, 0.5, 1])
        bottom.tick_params(labelsize=8)
        bottom.spines[["top", "right"]].set_visible(False)
        if column:
            bottom.set_yticklabels([])
        else:
            bottom.set_ylabel("DMS weight", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _wrapped(text: str, width: int = 27) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
