"""The page of `benchmarks/study.py` and the README's table hold what is in the files of results, and nothing else."""

import shutil
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import study


ROOT = Path(__file__).resolve().parents[3]


def test_page_and_readme_are_written_from_the_results(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "docs/results", tmp_path / study.RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- study:begin -->", "<!-- study:end -->"
    # only what stands between the markers is to be written
    (tmp_path / "README.md").write_text(
        f"{readme.split(begin)[0]}{begin}\nold\n{end}{readme.split(end)[1]}", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    folders = [study.RESULTS / name for name in ("photographs-llava", "photographs-blip2")]
    study.write(folders, Path("docs/study.md"), Path("README.md"))
    assert Path("README.md").read_text(encoding="utf-8") == readme
    assert Path("docs/study.md").read_text(encoding="utf-8") == (ROOT / "docs/study.md").read_text(encoding="utf-8")
