"""What `mkdocs build` needs of this repository: where its packages are, and equations as MathML.

MathML is drawn by the browser itself: equations need neither a script nor the network. On pages that show Markdown
themselves the same fences are drawn from their TeX.
"""

import re
import shutil
import tempfile
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "modeling_dms": "modeling_dms",
    "configuration": "modeling_dms/configuration",
    "training": "modeling_dms/training",
}
NO_SOURCES = shutil.ignore_patterns("__pycache__", "checkpoints")
_tree = tempfile.TemporaryDirectory()


def equation(source, language, css_class, options, md, **kwargs):
    """A fence of TeX, each line of it an equation."""
    lines = [convert(line, display="block") for line in source.splitlines() if line.strip()]
    return f'<div class="{css_class}">{"".join(lines)}</div>'


@event_priority(100)  # before mkdocstrings reads it
def on_config(config):
    """Tells mkdocstrings where sources are as setup.py maps them: neither an installation nor torch is needed."""
    for folder, place in FOLDERS.items():
        # copied: links to folders are not followed
        shutil.copytree(ROOT / folder, Path(_tree.name) / place, ignore=NO_SOURCES, dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_tree.name]
    fence = {"name": "math", "class": "equation", "format": equation}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_page_content(html, page, **kwargs):
    """As the Hub libraries write docstrings, [`Name`] is no link in Markdown and types have backticks of their own."""
    html = re.sub(r"\[(<code>[\w.]+</code>)\]", r"\1", html)
    return re.sub(r"<code>`[^<]*</code>", lambda found: found[0].replace("`", "").replace("*", ""), html)
