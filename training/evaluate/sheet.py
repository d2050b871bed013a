"""A sheet of samples: image, context, question, answers, and the modality weights as bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling_dms.training.data import Sample
from modeling_dms.training.data.samples import FIELDS


@dataclass
class Panel:
    """One sample of a sheet.

    Attributes:
        title: the corruption's name.
        answers: by method, what it said and whether that is right.
        weights: of image and context, or of each image and then each passage.
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
    # the bars of several sources are named in every column, and their passages take room
    width, height = (2.8, 5.8) if any(panel.sample.has_several for panel in panels) else (2.1, 5.0)
    figure, axes = pyplot.subplots(
        2 * rows,
        columns,
        figsize=(width * columns, height * rows),
        height_ratios=(1, 0.45) * rows,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)[len(panels) :].flat:
        axis.axis("off")
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        images = panel.sample.load_images()
        damaged = next((number for number in panel.sample.damaged_sources if number <= len(images)), 1)
        image = images[damaged - 1] if images else None
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
        context = "\n".join(f"“{_wrapped(passage)}”" for passage in panel.sample.passages or ["no context"])
        top.set_xlabel("\n".join([context, _wrapped(panel.sample.question), *said]), fontsize=8.5)
        names = panel.sample.source_names
        colors = ["#3b6fb6" if name.startswith(FIELDS[0]) else "#d98324" for name in names]
        bars = bottom.barh(names, panel.weights, color=colors)
        bottom.bar_label(bars, [f"{weight:.2f}" for weight in panel.weights], fontsize=9, padding=3)
        bottom.set_xlim(0, 1.3)
        bottom.invert_yaxis()
        bottom.axvline(1 / len(names), color="gray", linewidth=0.8, linestyle=":")
        bottom.set_xticks([0, 0.5, 1])
        bottom.tick_params(labelsize=8)
        bottom.spines[["top", "right"]].set_visible(False)
        if column and names == FIELDS:
            bottom.set_yticklabels([])
        if not column:
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
