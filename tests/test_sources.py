"""Several images and passages: each has a weight of its own, two of different types are the modalities, and what all
others contradict is found."""

import functools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_dms.auto import CLASSES
from modeling_dms.observe.prompt import TEXT, VISION
from tests import families, tiny


TOPICS = 6


def numbered(model: PreTrainedModel, inputs: dict[str, Tensor], passages: int = 2) -> Tensor:
    """Source ids of prompts: each image, then the text in so many parts as long as each other."""
    images = model._observed_images({"input_ids": None, **inputs})
    placeholders = model._placeholders(inputs["input_ids"])
    ids = torch.zeros_like(inputs["input_ids"])
    owner, first = images.rows(placeholders), {}
    of_tokens = []
    for image, row in enumerate(owner.tolist()):
        first.setdefault(row, image)
        of_tokens += [image - first[row] + 1] * int(images.lengths[image])
    ids[placeholders] = torch.tensor(of_tokens)
    for row, line in enumerate(model.infer_modality_ids(inputs["input_ids"], inputs.get("attention_mask"))):
        places, count = (line == TEXT).nonzero()[:, 0], int(ids[row].max())
        for number, part in enumerate(places.tensor_split(passages), 1):
            ids[row, part] = count + number
    return ids


def sets(count: int, images: int = 1, passages: int = 3, wrong: int | None = None, seed: int = 0) -> list[dict]:
    """Batches whose images and passages share a topic: a pattern, and words that only it has.

    Args:
        wrong: number, from 1, of the source that is of another topic.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(TOPICS, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    batches = []
    for start in range(0, count, 32):
        rows, sources, pixels = [], [], []
        for _ in range(start, min(start + 32, count)):
            topic = int(torch.randint(TOPICS, (1,), generator=generator))
            of = [topic] * (images + passages)
            if wrong is not None:
                of[wrong - 1] = (topic + 1 + int(torch.randint(TOPICS - 1, (1,), generator=generator))) % TOPICS
            line, ids = [tiny.BOS], [0]
            for number in range(images):
                line += [tiny.IMAGE] * tiny.IMAGE_TOKENS
                ids += [number + 1] * tiny.IMAGE_TOKENS
                noise = 0.3 * torch.randn(3, 8, 8, generator=generator)
                pixels.append(patterns[of[number]] + noise)
            for number in range(images, images + passages):
                line += (10 + 8 * of[number] + torch.randint(8, (6,), generator=generator)).tolist()
                ids += [number + 1] * 6
            rows.append(line)
            sources.append(ids)
        batch = {"input_ids": torch.tensor(rows), "source_ids": torch.tensor(sources)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batches.append(batch | ({"pixel_values": torch.stack(pixels)} if images else {}))
    return batches


@functools.cache
def calibrated(backbone: str, images: int = 1, passages: int = 3) -> PreTrainedModel:
    model = tiny.build(backbone, false_alarm_rate=0.1)
    report = model.calibrate(sets(128, images, passages), level=2, show_progress=False)
    assert report.sources["text-text" if passages > 1 else "image-image"] > 0.85
    return model


@pytest.mark.parametrize("backbone", ["llava-llama", "blip2-opt", "internvl-qwen3"])
@torch.no_grad()
def test_an_image_and_a_text_are_the_modalities(backbone):
    model = tiny.calibrated(backbone)
    inputs = tiny.noisy(tiny.clean_samples(4, 4)[0])
    ids = model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
    expected = model(**inputs, modality_ids=ids)
    types = torch.tensor([[VISION, TEXT]])
    for given in ({}, {"source_types": types}, {"source_types": types.expand(4, 2)}):
        out = model(**inputs, source_ids=ids, **given)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.modality_weights, expected.modality_weights)
        assert out.modality_signals.agreement is None
    assert not torch.equal(expected.modality_weights[:, 0], expected.modality_weights[:, 1])


@pytest.mark.parametrize("family", CLASSES)
@torch.no_grad()
def test_uniform_sources_change_nothing_and_a_source_of_weight_0_is_masked(family):
    model, inputs = families.shared(family, scheduler="uniform"), families.inputs(family)
    ids = numbered(model, inputs)
    prompt = model._prompt(inputs, model._observed_images({"input_ids": None, **inputs}), dict.fromkeys(
        ("modality_ids", "modality_mask", "modality_weights", "source_types")) | {"source_ids": ids})  # fmt: skip
    present = prompt.modality_mask
    vanilla = model(**inputs).logits
    assert torch.equal(model(**inputs, source_ids=ids).logits, vanilla)
    # without the first passage, which the second one stands behind
    first = (prompt.source_types == TEXT).long().argmax(1, keepdim=True)
    weights = present.float().scatter(1, first, 0)
    weights = weights / weights.sum(1, keepdim=True)
    out = model(**inputs, source_ids=ids, modality_weights=weights)
    assert torch.equal(out.modality_weights, weights)
    gone = ids == first + 1
    others = torch.where(gone, 4 + (inputs["input_ids"] - 3) % 60, inputs["input_ids"])
    changed = model(**{**inputs, "input_ids": others}, source_ids=ids, modality_weights=weights)
    kept = ~gone & inputs["attention_mask"].bool()
    if out.logits.shape[1] == ids.shape[1]:
        torch.testing.assert_close(out.logits[kept], changed.logits[kept], atol=1e-5, rtol=0)
        assert not torch.allclose(out.logits[kept], vanilla[kept], atol=1e-4)
    else:
        torch.testing.assert_close(out.logits, changed.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("backbone", "images", "passages", "wrong"),
    [
        ("llava-llama", 1, 3, 2),
        ("llava-llama", 1, 3, 4),
        ("llava-llama", 0, 4, 1),
        ("llava-llama", 3, 1, 2),
        ("blip2-opt", 1, 3, 3),
        ("blip2-t5", 1, 3, 3),
    ],
)
@torch.no_grad()
def test_the_source_that_all_others_contradict_loses_its_weight(backbone, images, passages, wrong):
    model = calibrated(backbone, *((1, 3) if images < 2 else (images, passages)))
    (clean,), (other,) = sets(32, images, passages, seed=1), sets(32, images, passages, wrong, seed=1)
    weights, signals = model.get_modality_weights(**clean)
    assert weights.shape == (32, images + passages)
    uniform = (weights == weights[:, :1]).all(1)
    assert uniform.float().mean() > 0.75
    weights, signals = model.get_modality_weights(**other)
    lowest = weights.argmin(1) == wrong - 1
    lowest &= weights.amin(1) < 0.1
    assert lowest.float().mean() > 0.7
    assert signals.agreement.shape == (32, images + passages, images + passages)
    assert signals.p_clean.shape == signals.p_match.shape == weights.shape


@torch.no_grad()
def test_batch_is_rows_and_what_is_saved_is_loaded(tmp_path):
    model = calibrated("llava-llama")
    (batch,) = sets(8, 1, 3, 3, seed=2)
    out = model(**batch)
    for index in range(4):
        one = {name: value[index : index + 1] for name, value in batch.items()}
        alone = model(**one)
        torch.testing.assert_close(alone.modality_weights, out.modality_weights[index : index + 1])
        torch.testing.assert_close(alone.logits, out.logits[index : index + 1], atol=2e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, out.logits)
    generated = model.generate(**batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(generated.modality_weights, out.modality_weights)
    assert generated.reliability is None


@torch.no_grad()
def test_an_image_and_a_text_are_weighed_alike_beside_rows_of_more_sources():
    model = calibrated("llava-llama")
    (batch,) = sets(8, 1, 3, seed=8)
    ids = batch["source_ids"].clone()
    ids[:4] = ids[:4].where(ids[:4] < 3, 0)  # the first four have one passage
    pixels = batch["pixel_values"] + 2 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = {**batch, "source_ids": ids, "pixel_values": pixels}
    few = {name: value[:4] for name, value in batch.items()}
    weights, alone = model(**batch).modality_weights, model(**few).modality_weights
    assert (alone[:, 0] < 0.5).any()
    torch.testing.assert_close(weights[:4, :2], alone)


@torch.no_grad()
def test_a_pair_that_disagrees_is_judged_alike_beside_rows_of_more_sources():
    model = tiny.build("llava-llama", false_alarm_rate=0.3, conflict_prior="vision")
    model.calibrate(sets(128), show_progress=False)
    (batch,) = sets(32, wrong=1, seed=8)
    ids = batch["source_ids"].clone()
    ids[:16] = ids[:16].where(ids[:16] < 3, 0)  # half have one passage
    batch = {**batch, "source_ids": ids}
    out, alone = model(**batch), model(**{name: value[:16] for name, value in batch.items()})
    assert (alone.modality_weights[:, 0] > 0.9).any()
    torch.testing.assert_close(out.modality_weights[:16, :2], alone.modality_weights)
    for name in ("p_clean", "p_match"):
        torch.testing.assert_close(out.modality_signals[name][:16, :2], alone.modality_signals[name])
    torch.testing.assert_close(out.reliability[:16], alone.reliability, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        model(**batch, labels=batch["input_ids"].where(batch["source_ids"] == 2, -100)).loss.backward()
    assert out.reliability[16:].isnan().all()


def test_calibration_heeds_sources_beside_a_batch_of_pairs():
    model = tiny.build("llava-llama", false_alarm_rate=0.1)
    report = model.calibrate([*sets(96), *sets(2, 1, 1, seed=3)], level=2, show_progress=False)
    assert report.samples["vision"] == 98
    assert report.sources["text-text"] > 0.8


def test_sources_that_are_asked_about_twice_are_one_sample():
    """Else what belongs together would look alike by heart."""
    batches, found = sets(96), []
    for some in (batches, [{name: torch.cat([value] * 2) for name, value in batch.items()} for batch in batches]):
        model = tiny.build("llava-llama")
        found.append((model.calibrate(some, level=1, show_progress=False), model.dms.calibration))
    (once, one), (twice, two) = found
    assert twice.samples["vision"] == 2 * once.samples["vision"]
    assert [int(kept.count) for kept in two.clean_sets] == [int(kept.count) for kept in one.clean_sets]
    assert twice.sources["text-text"] == pytest.approx(once.sources["text-text"], abs=0.02)


@torch.no_grad()
def test_several_images_are_several_sources_where_calibration_knows_such():
    model, pairs = calibrated("llava-llama", 3, 1), tiny.calibrated("llava-llama")
    (batch,) = sets(8, 3, 1, 2, seed=6)
    given = model(**batch)
    inputs = {name: value for name, value in batch.items() if name != "source_ids"}
    inferred = model(**inputs)
    assert torch.equal(inferred.modality_weights, given.modality_weights)
    assert torch.equal(inferred.logits, given.logits)
    # told otherwise, or with one image a row, they are modalities
    ids = model.infer_modality_ids(batch["input_ids"])
    assert model(**inputs, modality_ids=ids).modality_weights.shape == (8, 2)
    (single,) = sets(8, 1, 1)
    del single["source_ids"]
    assert model(**single).modality_weights.shape == (8, 2)
    assert pairs(**inputs).modality_weights.shape == (8, 2)


@torch.no_grad()
def test_sixteen_sources_work():
    model = calibrated("llava-llama")
    (batch,) = sets(2, 1, 15, seed=7)
    weights = model(**batch).modality_weights
    assert weights.shape == (2, 16)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


@torch.no_grad()
def test_rows_differ_in_their_sources():
    model = calibrated("llava-llama")
    (batch,) = sets(3, 1, 3, seed=3)
    ids = batch["source_ids"].clone()
    ids[1, ids[1] == 4] = 0  # two passages, the third is neutral
    ids[2, ids[2] > 1] = 0  # an image alone
    weights = model(**{**batch, "source_ids": ids}).modality_weights
    assert (weights[1, 3:] == 0).all()
    assert weights[2].tolist() == [1, 0, 0, 0]
    masked = model(**batch, modality_mask=torch.tensor([[True, True, False, True]]).expand(3, 4)).modality_weights
    assert (masked[:, 2] == 0).all()
    torch.testing.assert_close(masked.sum(1), torch.ones(3))


def test_a_tie_and_a_majority_that_disagrees_change_nothing():
    model = calibrated("llava-llama")
    (right,), (wrong,) = sets(16, 0, 4, seed=4), sets(16, 0, 4, seed=5)
    half = torch.where(right["source_ids"] > 2, wrong["input_ids"], right["input_ids"])
    weights, signals = model.get_modality_weights(**{**right, "input_ids": half})
    odd = weights[signals.p_clean.amin(1) > 0.1 / 8]
    assert len(odd) > 0
    assert torch.equal(odd, torch.full_like(odd, 0.25))


def test_what_cannot_be_is_said():
    model, learned = calibrated("llava-llama"), tiny.build("llava-llama", scheduler="learned")
    (batch,) = sets(2, 1, 3)
    with pytest.raises(ValueError, match="source_ids must have the shape"):
        model(**{**batch, "source_ids": batch["source_ids"][:, 1:]})
    with pytest.raises(ValueError, match="source_types must be"):
        model(**batch, source_types=torch.tensor([[2, 2, 2, 2]]))
    split = batch["source_ids"].clone()
    split[:, 1] = 5
    with pytest.raises(ValueError, match="one number"):
        model(**{**batch, "source_ids": split})
    with pytest.raises(ValueError, match=r"modality_mask must be \(batch, source\)"):
        model(**batch, modality_mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scheduler='rule' or 'uniform', got 'learned'"):
        learned(**batch)
    with pytest.raises(ValueError, match="either modality_ids or source_ids"):
        model(**batch, modality_ids=batch["source_ids"].clamp_max(2))
    with pytest.raises(ValueError, match="neither"):
        model(**{**batch, "source_ids": torch.zeros_like(batch["source_ids"])})


def test_training_weighs_sources_and_gives_gradients():
    model = tiny.build("llava-llama").train()
    (batch,) = sets(2, 1, 3)
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    assert out.modality_weights.shape == (2, 4)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_decoder().parameters())
