"""What weighing changes on photographs: `dms evaluate` on models that describe them.

    python benchmarks/study.py --photos PHOTOS --models runs/llava/final,... [--out docs/study.md]

Each model, trained by `benchmarks/static.py` on the photographs of the training split, is calibrated on those of the
validation split, which it has not learned by heart, without labels: one question each. Questions of the test split are
asked then. Results go to `docs/results`, where a run that was stopped goes on, and from there into the page and the
README's table.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from static import saved

from modeling_dms import DMSConfig
from modeling_dms.training.apps.demo import SUMMARISED, summary
from modeling_dms.training.data import PromptCollator, load_flickr8k
from modeling_dms.training.evaluate.baselines import GRIDS
from modeling_dms.training.evaluate.documents import table, write_between_markers
from modeling_dms.training.evaluate.report import combine, read_results
from modeling_dms.training.models.calibrate import calibrate
from modeling_dms.training.models.loading import load
from modeling_dms.training.publish.release import release


# damage of families that neither training nor calibration's detectors know, and others' images and texts
KINDS = (
    *("image:fog", "image:low_contrast", "image:pixelate", "image:jpeg", "image:glitch", "image:color_cast"),
    *("text:typos", "text:scramble", "image:mismatch", "text:mismatch"),
)
PUBLISHED = ("VCD", "AdaptVis")
METHODS = ("static", "rule", "oracle", *PUBLISHED)
GROUPS = {
    **{group: SUMMARISED[group] for group in ("clean", "unseen image", "unseen text")},
    "mismatch image": "another's image",
    "mismatch text": "another's text",
}
# photographs of the validation split on which hyperparameters of published methods are chosen
SEARCHED = 20
# of damage as bad as it gets, and of milder damage
SEVERITY, MILD = 5, 3
RESULTS = Path("docs/results")
PAGE = """# What weighing changes on photographs

Written by `python benchmarks/study.py`. Models that `benchmarks/static.py` trained on photographs of Flickr8k
([what they make of photographs](photographs.md)) are asked about {samples} others, one question each, beside one of
their captions, which answers some questions and not others. Calibration saw the photographs of the validation split,
without labels; where a kind of damage is tested, the detectors of damage like it are switched off. DMS may call
{rate:.0%} of clean pairs suspicious, its default, half of it for each source: with {calibrated} samples that is beyond
what counting can promise and rests on the tail of their scores. What came of it stands below, as *clean samples whose
weights are not uniform*. A *mismatch* is another photograph's image or caption. Severity is 5 of 5{milder}. Not
measured here yet: other draws, captions and retrieval. Flickr8k is for research; its photographs belong to their
photographers: none is shown here. *DMS* is called `rule` in the longer tables.

"""
AGAINST = """## Beside published methods

VCD (Leng et al., CVPR 2024) contrasts an answer with that to a noisy image, AdaptVis (Chen et al., ICML 2025) scales
the attention to the image by how sure an answer is. Both were made for hallucinations, not for damage. Their
hyperparameters were chosen among {vcd} and {adaptvis} on {samples} validation photographs: clean, noisy, occluded,
with random words or without text. The last column is DMS minus the better of the two, in points; intervals over all
unseen damage stand below.

"""
RELIABLE = """## How far answers can be relied on

The area under the risk-coverage curve, lower is better, if the least sure answers are left out by the probability of
the chosen answer or by `out.reliability`. Reliability, which helps on [shapes](reliability.md), tells right answers
from wrong ones no better here.

"""
MILDER = """## Milder damage

The same damage of severity {mild} instead of {severity}, as far as it was measured.

"""


def calibrated(name: str, photos: Path, out: Path) -> None:
    """Calibrates a model on photographs that it was not trained on, and saves it as it is released."""
    model, processor = load(name, merge=False)
    report = calibrate(model.eval(), PromptCollator(processor), load_flickr8k("validation", "vqa", photos), 1000)
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        saved(model, processor, Path(folder))
        release(Path(folder), Path(model.peft_config["default"].base_model_name_or_path).name, out)
    (out / "calibration.txt").write_text(f"{report}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of Flickr8k's files")
    parser.add_argument("--models", required=True, help="folders, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("docs/study.md"))
    options = parser.parse_args()
    folders = []
    for name in options.models.split(","):
        weighed = Path(name).parent / f"photographs-{Path(name).parent.name}"
        if not weighed.exists():  # to be deleted where the model, or the package, has changed
            calibrated(name, options.photos, weighed)
        folders.append(RESULTS / weighed.name)
        evaluate(weighed, folders[-1], options.methods, KINDS, SEVERITY, options.photos)
        shutil.copy(weighed / "calibration.txt", folders[-1])
        mild = of_mild(folders[-1])
        damage = [kind for kind in KINDS if not kind.endswith(":mismatch")]  # there is no mild mismatch
        evaluate(weighed, mild, "static,rule,oracle", damage, MILD, options.photos)
        (folders[-1] / "samples.png").unlink(missing_ok=True)  # the photographs belong to others
        for extra in (*folders[-1].glob("*.md"), *mild.iterdir()):
            if extra.suffix in {".md", ".png"}:
                extra.unlink()  # the page holds it all
    write(folders, options.out, Path("README.md"))


def evaluate(model: Path, out: Path, methods: str, kinds: Sequence[str], severity: int, photos: Path) -> None:
    """Runs `dms evaluate` on the test photographs, or goes on with it."""
    asked = ["--data", photos, "--split", "test", "--kinds", ",".join(kinds), "--seeds", 1]
    asked += ["--severities", severity, "--methods", methods, "--batch-size", 16, "--resume"]
    asked += ["--validation-samples", SEARCHED]
    command = [Path(sys.executable).parent / "dms", "evaluate", "--model", model, *asked, "--out", out]
    subprocess.run(list(map(str, command)), check=True)


def of_mild(results: Path) -> Path:
    """Where its results on milder damage lie."""
    return results.with_name(f"{results.name}-mild")


def beside_published(folders: list[Path]) -> str:
    """DMS beside methods that others have published."""
    rows = []
    for folder in folders:
        scores = {(row["group"], row["method"]): row["score"] for row in read_results(folder)["results"]["groups"]}
        for group, shown in GROUPS.items():
            static, rule, *others = (scores[group, method] for method in ("static", "rule", *PUBLISHED))
            more = f"{100 * (rule - max(others)):+.1f}"
            rows.append([folder.name, shown, *(f"{score:.3f}" for score in (static, *others, rule)), more])
    return table(["checkpoint", "inputs", "static", *PUBLISHED, "DMS", "DMS - the better"], rows)


def reliable(folders: list[Path]) -> str:
    """What tells right answers from wrong ones."""
    rows = []
    for folder in folders:
        for row in read_results(folder)["results"]["groups"]:
            if row["method"] == "rule" and row["group"] in GROUPS:
                areas = [f"{row[name]:.3f}" for name in ("aurc", "aurc_reliability")]
                rows.append([folder.name, GROUPS[row["group"]], *areas])
    return table(["checkpoint", "inputs", "answer's probability", "`out.reliability`"], rows)


def write(folders: list[Path], out: Path, readme: Path) -> None:
    """Writes the page, and the README's table, from what was found."""
    found = [(folder.name, read_results(folder)) for folder in folders]
    short = summary([(name, of["results"]["groups"]) for name, of in found])
    write_between_markers(readme, "study", short)
    combine(folders, out)
    tables = out.read_text(encoding="utf-8").replace("# Results\n\n", "", 1)
    for name, of in found:  # a model is called by its name, not by the folder that it lay in
        tables = tables.replace(f"## {of['run']['model']}:", f"## {name}:")
    reports = {folder.name: (folder / "calibration.txt").read_text(encoding="utf-8").strip() for folder in folders}
    clean = re.search(r"by (\d+) clean samples", reports[folders[0].name])
    counts = {"calibrated": clean and clean[1], "samples": found[0][1]["run"]["samples"]}
    measured = [folder for folder in folders if of_mild(folder).exists()]
    milder = f", and [{MILD}](#milder-damage) in one table" if measured else ""
    page = [PAGE.format(rate=DMSConfig().false_alarm_rate, milder=milder, **counts) + short]
    tried = {name.lower(): len(GRIDS[name]) for name in PUBLISHED}
    page += [AGAINST.format(samples=SEARCHED, **tried) + beside_published(folders)]
    if measured:
        mild = summary([(folder.name, read_results(of_mild(folder))["results"]["groups"]) for folder in measured])
        page.append(MILDER.format(mild=MILD, severity=SEVERITY) + mild)
    page += [RELIABLE + reliable(folders), tables.strip()]
    for name, report in reports.items():
        page.append(f"## What calibration says: {name}\n\n```\n{report}\n```")
    out.write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
