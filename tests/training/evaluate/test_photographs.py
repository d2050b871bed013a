"""What `benchmarks/photographs.py` reads at once is what the model says of each prompt by itself."""

import sys
from pathlib import Path

import pytest
import torch

from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.models.loading import load


sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import photographs


@pytest.fixture(scope="module")
def reader():
    model, processor = load("demo-llava", {"scheduler": "uniform"})
    return photographs.Reader(model.eval(), processor)


@pytest.fixture
def exact(monkeypatch):
    """No bfloat16."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: autocast("cpu", enabled=False))


@pytest.mark.usefixtures("exact")
@torch.no_grad()
def test_prompts_side_by_side_are_prompts_by_themselves(reader):
    samples = load_easy_vqa("test")[:40:10]
    answers = [("red", "a blue circle"), ("yes",), ("teal",), ("no", "red", "gray")]
    images = [sample.load_image() for sample in samples]
    states = reader.encode(images)
    rows = [[reader.asked(s, given)[1] for s, given in zip(samples, answers, strict=True)] for _ in samples]
    prefix, _ = reader.asked(samples[0])
    found = reader.log_likelihoods(states, prefix, rows)
    for image, own in zip(images, found, strict=True):
        said = iter(own)
        for sample, given in zip(samples, answers, strict=True):
            for answer in given:
                batch = reader.collate([sample.replace(image=image, answers=(answer,))])
                labels = batch.pop("labels")[0, 1:]
                logits = reader.model(**batch).logits[0, :-1].log_softmax(-1)
                expected = logits[labels != -100].gather(1, labels[labels != -100, None])[:, 0]
                torch.testing.assert_close(next(said), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_blind_prompt_does_not_hang_on_the_image(reader):
    sample, other = load_easy_vqa("test")[:80:40]
    states = reader.encode([sample.load_image(), other.load_image()])
    prefix, asked = reader.asked(sample, ("red", "blue"))
    _, blind = reader.asked(sample, ("red", "blue"), sees=False)
    one, two = reader.log_likelihoods(states, prefix, [[asked, blind]] * 2)
    assert not torch.equal(one[0], two[0])
    assert torch.equal(torch.cat(one[2:]), torch.cat(two[2:]))
