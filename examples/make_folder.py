"""Writes a folder of pictures with a table, as `dms calibrate`, `dms train` and `dms evaluate` read one of yours.

    python examples/make_folder.py my_folder

The pictures are 400 of `easy-vqa` that no shipped checkpoint was trained on.
"""

import json
import shutil
import sys
from pathlib import Path

from modeling_dms.training.data import load_samples


folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
# one question a picture
asked = {sample.image: sample for sample in reversed(load_samples("easy-vqa", "test"))}
with (folder / "table.jsonl").open("w", encoding="utf-8") as table:
    for number, sample in enumerate(list(asked.values())[::-1][:400]):
        shutil.copy(sample.image, folder / f"{number}.png")
        row = {
            "image": f"{number}.png",
            "context": sample.context,
            "question": sample.question,
            "answers": sample.answers,
        }
        table.write(json.dumps(row) + "\n")
print(f"wrote 400 pictures and {folder / 'table.jsonl'}")
