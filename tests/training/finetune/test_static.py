"""What `benchmarks/static.py` does to what it trains."""

import random
import sys
from pathlib import Path

import torch

from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.finetune.stages import prepare
from modeling_dms.training.models.loading import load


sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import photographs
import static


def test_a_q_former_comes_to_say_what_a_projector_does(monkeypatch):
    monkeypatch.setattr(static, "IMITATED", 120)
    monkeypatch.setattr(static, "VIEWS", 1)
    samples = load_easy_vqa("train")[:80:10]
    teacher = photographs.Reader(*load("demo-llava", {"scheduler": "uniform"}))
    tokens = teacher.tokens
    # nearer to the size of what the Q-Former says
    monkeypatch.setattr(teacher, "tokens", lambda seen: tokens(seen) / 20)
    model, processor = load("demo-blip2", {"scheduler": "uniform"})
    reader = photographs.Reader(prepare(model.eval(), "backbone", 2, train_bridge=True, lora_targets="all"), processor)
    states = photographs.encoded(reader, samples, 1)
    told = {name: teacher.tokens(seen.float()) for name, seen in photographs.encoded(teacher, samples, 1).items()}

    @torch.no_grad()
    def error():
        # four image tokens of the projector to a query
        said = torch.cat([reader.tokens(seen.float()) for seen in states.values()])
        return (said - torch.cat(list(told.values())).unflatten(1, (said.shape[1], 4)).mean(2)).pow(2).mean()

    before = error()
    static.imitate(reader, states, teacher, samples, random.Random(0))
    assert error() < before / 3


def test_a_lower_rank_is_taken_over_whole():
    models = [
        prepare(load("demo-llava", {"scheduler": "uniform"})[0], "backbone", rank, lora_targets="all")
        for rank in (2, 4)
    ]
    teacher, model = models
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    static.adopt(model, teacher)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, found = (of.get_base_model().model.language_model(ids).last_hidden_state for of in models[:2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
