"""The study of the assembled checkpoints: runs `dms evaluate` where it has not finished, and writes the tables and the
picture of docs/study.md.

    python benchmarks/study.py [--only llava-scan llava-vqa] [--tables]

`scan` looks, on validation images, for corruptions that the static model does not cope with. The other evaluations
take those, on test images.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from modeling_dms.training.evaluate.documents import points, table, write_between_markers


matplotlib.use("Agg")
from matplotlib import pyplot


FOLDER, DOCUMENT, CALIBRATED = Path("docs/study"), Path("docs/study.md"), Path("runs")
MODELS = {"llava": "model_cards/llava-dinov2s-smollm2-135m", "blip2": "model_cards/blip2-dinov2s-smollm2-135m"}
# of families that neither training nor calibration sees
UNSEEN = {
    "image": (
        *("fog", "pixelate", "jpeg", "posterize", "glitch", "jigsaw", "swirl"),
        *("invert", "dark", "overexposed", "low_contrast", "solarize", "color_cast"),
    ),
    "text": ("typos", "scramble"),
}
# an image corruption is worth studying where the static model loses so much; of more, the most harmful ones
LOSS, MOST = 0.1, 4
BASELINES = "entropy,energy,mean prior"
SLOW = ",VCD,AdaptVis"
PRIORS = "rule + prior,rule + text prior"
COMMON = "--severities 3,5 --training-samples 600 --dtype bfloat16 --batch-size 16"
EASY_VQA = f"--data easy-vqa {COMMON}"
# drawings of concepts, the same in a style unseen in training, and photographs; weighed by what OpenMoji's clean
# training drawings look like, searched on its validation split
PICTURES = ("openmoji", "noto", "stamps")
# by methods that need no data, at severity 5
QUICK = (
    f"{COMMON.replace('3,5', '5')} --corruptions seen,unseen,mismatch,image:black+text:missing --seeds 1 "
    "--samples 24 --methods 'static,rule,rule + text prior,oracle'"
)
LEFT_OUT = "image:missing,text:missing,image:mismatch,text:mismatch"
# by name of an evaluation, what `dms evaluate` is told
EVALUATIONS = {
    "scan": f"--task vqa {EASY_VQA} --split validation --corruptions unseen --seeds 1 --samples 60 "
    "--methods static,oracle",
    "vqa": f"--task vqa {EASY_VQA} --corruptions seen,unseen,mismatch,both,image:black+text:missing --seeds 3 "
    f"--samples 40 --methods 'static,rule,learned,{BASELINES}{SLOW},oracle' --validation-samples 16",
    # more images: conditions in which DMS could lose
    "policy": f"--task vqa {EASY_VQA} --corruptions mismatch,both --seeds 2 --samples 200 "
    f"--methods 'static,rule,{PRIORS},oracle'",
    "retrieval": f"--task retrieval {EASY_VQA} --corruptions unseen,mismatch --seeds 3 --samples 24 "
    f"--methods 'static,rule,{PRIORS},learned,{BASELINES}{SLOW},oracle' --validation-samples 8",
    "caption": f"--task caption {EASY_VQA} --corruptions unseen,mismatch --seeds 3 --samples 24 "
    f"--methods 'static,rule,{PRIORS},learned,{BASELINES}{SLOW},oracle' --validation-samples 8",
    "openmoji": f"--task caption --data openmoji {COMMON} --corruptions seen,unseen,mismatch,image:black+text:missing "
    f"--seeds 1 --samples 24 --methods 'static,rule,{PRIORS},{BASELINES},oracle' --validation-samples 8",
    "openmoji-vqa": f"--task vqa-generate --data openmoji {QUICK.replace('--samples 24', '--samples 48')}",
    "openmoji-retrieval": f"--task retrieval --data openmoji {QUICK}",
    "noto": f"--task caption --data noto --training-data openmoji {QUICK}",
    "stamps": f"--task caption --data stamps --training-data openmoji {QUICK}",
}

DMS = ("rule", "rule + prior", "rule + text prior", "learned")
REFERENCES = ("static", "oracle")
GROUPS = ("clean", "seen", "unseen image", "unseen text", "mismatch image", "mismatch text", "both")
# what is left of a sample, by the condition that leaves it
LEFT = {
    "both": "clean",
    "image only": "text:missing",
    "context only": "image:missing",
    "neither": "image:black+text:missing",
}
SHOWN_WEIGHTS = ("clean", "image:fog", "image:pixelate", "text:typos", "text:scramble")
TITLES = {"vqa": "VQA", "vqa-generate": "VQA", "caption": "captions", "retrieval": "retrieval"}


def title_of(results: dict[str, Any]) -> str:
    """Model and task of an evaluation."""
    run = results["run"]
    data = f" of {run['data']}" if run["data"] in PICTURES else ""
    policies = ", policies" if results["name"].endswith("-policy") else ""
    return f"{Path(run['model']).name.split('-')[0]}, {TITLES[run['task']]}{data}{policies}"


def what_is_left(evaluations: Sequence[dict[str, Any]]) -> str:
    """Static's score with both modalities, with one, and with neither."""
    rows = []
    for results in evaluations:
        kept = [row for row in results["results"]["conditions"] if row["method"] == "static"]
        if not set(LEFT.values()) <= {row["condition"] for row in kept}:
            continue
        scores = [[row["score"] for row in kept if row["condition"] == name] for name in LEFT.values()]
        rows.append([title_of(results), *(f"{np.mean(own):.3f}" if own else "-" for own in scores)])
    return table(["static model", *LEFT], rows)


def clean_weights(evaluations: Sequence[dict[str, Any]]) -> str:
    """The mean image weight that the rule gives: of clean samples it should be one half."""
    rows = []
    for results in evaluations:
        kept = [row for row in results["results"]["conditions"] if row["method"] == "rule"]
        weights = {name: [row["weights"][0] for row in kept if row["condition"] == name] for name in SHOWN_WEIGHTS}
        rows.append([title_of(results), *(f"{np.mean(own):.2f}" if own else "-" for own in weights.values())])
    return table(["mean image weight", *SHOWN_WEIGHTS], rows)


def groups_of(results: dict[str, Any]) -> str:
    """Every method on every group: the difference to static in points, and the oracle gap closed."""
    found = {(row["group"], row["method"]): row for row in results["results"]["groups"]}
    methods = list(dict.fromkeys(method for _, method in found))
    groups = [group for group in GROUPS if (group, "static") in found]
    rows = []
    for method in methods:
        cells = []
        for row in (found.get((group, method)) for group in groups):
            if row is None:
                cells.append("-")
            elif method == "static":
                cells.append(f"{row['score']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]")
            else:
                closed = row["gap_closed"] if method != "oracle" else None
                cells.append(points(row["minus_static"]) + ("" if closed is None else f", {closed[0]:.2f}"))
        rows.append([method, *cells])
    return f"### {title_of(results)}: {results['run']['metric']}\n\n" + table(["method", *groups], rows)


def against(evaluations: Sequence[dict[str, Any]]) -> str:
    """DMS (`rule`) minus every published baseline on all unseen corruptions together."""
    evaluations = [results for results in evaluations if not results["name"].endswith("-policy")]
    minus = [{"static": None, **results["results"]["against"]["minus"]} for results in evaluations]
    names = [n for n in dict.fromkeys(name for own in minus for name in own) if not n.startswith(DMS)]
    rows = [
        [title_of(results), *("-" if own.get(name) is None else points(own[name]) for name in names)]
        for results, own in zip(evaluations, minus, strict=True)
    ]
    return table(["`rule` minus", *names], rows)


def draw(evaluations: Sequence[dict[str, Any]], path: Path) -> None:
    """Points over static by group, an evaluation a panel."""
    columns = min(2, len(evaluations))
    lines = -(-len(evaluations) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.4 * columns, 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(evaluations) :]:
        axis.set_visible(False)
    colors = dict(
        zip(
            (*DMS, "best baseline", "oracle"),
            ("#d98324", "#4f9d69", "#a3c585", "#7a6fc4", "#3b6fb6", "#bbbbbb"),
            strict=True,
        )
    )
    for axis, results in zip(axes.flat, evaluations, strict=False):
        found = {(row["group"], row["method"]): row["minus_static"] for row in results["results"]["groups"]}
        groups = [group for group in GROUPS if (group, "static") in found and group != "clean"]
        methods = dict.fromkeys(method for _, method in found)
        baselines = [m for m in methods if m not in (*DMS, *REFERENCES) and not m.startswith("learned")]
        for place, name in enumerate(colors):
            for number, group in enumerate(groups):
                if name == "best baseline":
                    known = [found[group, m] for m in baselines if (group, m) in found]
                    value = max(known, key=lambda v: v[0]) if known else None
                else:
                    value = found.get((group, name))
                if value is None:
                    continue
                mean, low, high = (100 * part for part in value)
                axis.bar(
                    number + (place - 2.5) * 0.14,
                    mean,
                    0.13,
                    color=colors[name],
                    yerr=[[mean - low], [high - mean]],
                    ecolor="#555555",
                    error_kw={"linewidth": 0.8},
                )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups], fontsize=8)
        axis.set_title(title_of(results), fontsize=10)
        axis.set_ylabel(f"{results['run']['metric']}, points over static", fontsize=8)
        axis.grid(alpha=0.3, axis="y")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="upper center", ncols=len(colors), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def chosen(scan: dict[str, Any]) -> dict[str, list[str]]:
    """The unseen corruptions to study, by modality: of images those that the static model does not cope with, the most
    harmful ones first; of texts both, whether it does or not."""
    static = [row for row in scan["results"]["conditions"] if row["method"] == "static"]
    clean = next(row["score"] for row in static if row["condition"] == "clean")
    loss = {row["condition"]: 0.0 for row in static}
    for row in static:
        loss[row["condition"]] = max(loss[row["condition"]], clean - row["score"])
    images = sorted((name for name in loss if name.startswith("image:")), key=lambda name: -loss[name])
    harmful = [name for name in images if loss[name] > LOSS - 1e-9]
    return {"image": harmful[:MOST], "text": [f"text:{kind}" for kind in UNSEEN["text"]]}


def scanned(scans: Sequence[dict[str, Any]]) -> str:
    """What static and oracle make of every unseen corruption, on validation images."""
    rows = []
    for scan in scans:
        scores = {(r["condition"], r["severity"], r["method"]): r["score"] for r in scan["results"]["conditions"]}
        names = sorted({name for name, *_ in scores if name != "clean"})
        taken = [name for side in chosen(scan).values() for name in side]
        for name in names:
            values = [f"{scores[name, severity, m]:.3f}" for severity in (3, 5) for m in REFERENCES]
            rows.append([title_of(scan), name, *values, "yes" if name in taken else ""])
        rows.append([title_of(scan), "clean", f"{scores['clean', 0, 'static']:.3f}", "", "", "", ""])
    return table(["model", "corruption", "static, 3", "oracle, 3", "static, 5", "oracle, 5", "studied"], rows)


def read(name: str) -> dict[str, Any] | None:
    """The results of an evaluation, if it has finished."""
    file = FOLDER / name / "results.json"
    return {"name": name, **json.loads(file.read_text(encoding="utf-8"))} if file.exists() else None


def run(model: str, name: str) -> None:
    """`dms evaluate`, as far as it has not run yet."""
    out, options = FOLDER / f"{model}-{name}", shlex.split(EVALUATIONS[name])
    if read(out.name) is not None:
        return
    kinds = [f"{side}:{kind}" for side, names in UNSEEN.items() for kind in names]
    if name != "scan":
        scan = read(f"{model}-scan")
        if scan is None:
            raise ValueError(f"{model}-scan must run before {out.name}: it chooses the corruptions")
        kinds = [*(kind for side in chosen(scan).values() for kind in side), *LEFT_OUT.split(",")]
    known = options[options.index("--data") + 1] not in PICTURES
    checkpoint = MODELS[model] if known else calibrated(model)
    dms("evaluate", *options, "--kinds", ",".join(kinds), "--model", checkpoint, "--out", str(out), "--resume")
    if not known:  # drawings under other licences stay in their packages
        (out / "samples.png").unlink(missing_ok=True)
        report = out / "report.md"
        shown = report.read_text(encoding="utf-8").replace("\n![samples](samples.png)\n", "")
        report.write_text(shown, encoding="utf-8")


def calibrated(model: str) -> str:
    """The released checkpoint, calibrated on OpenMoji's clean training drawings."""
    out = CALIBRATED / f"{model}-openmoji"
    if not out.exists():
        dms("calibrate", "--model", MODELS[model], "--data", "openmoji:caption", "--out", str(out))
    return str(out)


def dms(*arguments: str) -> None:
    """The command line's `dms`."""
    subprocess.run([sys.executable, "-m", "modeling_dms.training.cli", *arguments], check=True)


def main() -> None:
    names = [f"{model}-{name}" for name in EVALUATIONS for model in MODELS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="Run these alone.")
    parser.add_argument("--tables", action="store_true", help="Write the document, run nothing.")
    options = parser.parse_args()
    for name in options.only if not options.tables else ():
        run(*name.split("-", 1))
    found = {name: results for name in names if (results := read(name)) is not None}
    scans = [results for name, results in found.items() if name.endswith("-scan")]
    evaluations = [results for name, results in found.items() if not name.endswith("-scan")]
    write_between_markers(DOCUMENT, "scan", scanned(scans))
    write_between_markers(DOCUMENT, "left", what_is_left(evaluations))
    write_between_markers(DOCUMENT, "against", against(evaluations))
    write_between_markers(DOCUMENT, "weights", clean_weights(evaluations))
    pictures = [results for results in evaluations if results["run"]["data"] in PICTURES]
    others = [results for results in evaluations if results not in pictures]
    for marker, some, picture in (("groups", others, "overview.png"), ("pictures", pictures, "pictures.png")):
        write_between_markers(DOCUMENT, marker, "\n\n".join(groups_of(results) for results in some))
        if some:
            draw(some, FOLDER / picture)


if __name__ == "__main__":
    main()
