"""Corruptions by name and family, their draws, and modality dropout."""

import builtins
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, TrainerState

from modeling_dms.calibrate import damage
from modeling_dms.training.corruptions import (
    FAMILIES,
    IMAGE_CORRUPTIONS,
    IMAGENET_C,
    NAMES,
    TEXT_CORRUPTIONS,
    CorruptionConfig,
    EpochCallback,
    ModalityDropout,
    corrupt,
    family_of,
    names_in,
    self_made_families,
)
from modeling_dms.training.data import Sample


CONTEXT = "the picture shows a teal circle on a large white sheet."
IMAGE_KINDS = [name for name in NAMES if name.startswith("image:") and not name.endswith(("missing", "mismatch"))]
# drawn the same for every sample: nothing in them is random
NOT_RANDOM = {
    *("black", "blur", "invert", "dark", "low_contrast", "pixelate", "solarize", "channel_swap"),
    *("overexposed", "jpeg", "posterize"),
    *("imagenet_c/defocus_blur", "imagenet_c/zoom_blur", "imagenet_c/gaussian_blur", "imagenet_c/brightness"),
    *("imagenet_c/contrast", "imagenet_c/saturate", "imagenet_c/pixelate", "imagenet_c/jpeg_compression"),
}


def picture(seed=0, size=(64, 64)):
    """Smooth color patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def sample(number=0, **changes):
    color = ("red", "teal", "blue")[number % 3]
    made = Sample(f"sample-{number}", picture(number), f"a {color} circle, number {number}.", "which color?", (color,))
    return made.replace(**changes)


def pixels(made):
    return np.asarray(made.image, dtype=float)


def facts(made):
    """All of a sample, to compare."""
    image = made.image if made.image is None else made.image.tobytes()
    return made.id, image, made.context, made.question, made.answers, made.damage


def only(samples):
    return samples


# ---- single corruptions


@pytest.mark.parametrize("name", IMAGE_KINDS)
def test_image_corruptions_are_reproducible_and_leave_the_global_generator_alone(name):
    clean = sample()
    for severity in (1, 3, 5):
        np.random.seed(severity)
        state = np.random.get_state()
        once = corrupt(clean, name, severity)
        after = np.random.get_state()
        assert all(np.array_equal(a, b) for a, b in zip(state, after, strict=True))
        np.random.seed(99)
        assert facts(corrupt(clean, name, severity)) == facts(once)
        assert once.image.size == clean.image.size
        assert once.image.mode == "RGB"
        assert once.damage == (severity / 5, 0.0)
        assert not np.array_equal(pixels(once), pixels(clean))
    assert (once.id, once.context) == (clean.id, clean.context)


@pytest.mark.parametrize("name", IMAGE_KINDS)
def test_image_corruptions_differ_by_sample_and_salt_where_they_are_random(name):
    cases = ((sample(), ""), (sample(id="b"), ""), (sample(), "@1"))
    one, other, salted = (pixels(corrupt(made, name, 4, salt=salt)) for made, salt in cases)
    random = name.partition(":")[2] not in NOT_RANDOM
    assert np.array_equal(one, other) != random
    assert np.array_equal(one, salted) != random


@pytest.mark.parametrize("name", [n for n in names_in("image", ["noise", "blur"]) if "glass" not in n])
def test_noise_and_blur_grow_with_severity(name):
    # glass blur is the exception: its passes and shifts do not both grow
    changes = [abs(pixels(corrupt(sample(), name, s)) - pixels(sample())).mean() for s in range(1, 6)]
    assert changes == sorted(changes)


def test_imagenet_c_holds_the_librarys_kinds_and_returns_their_output():
    imagecorruptions = pytest.importorskip("imagecorruptions")
    assert {f"imagenet_c/{kind}" for kind in imagecorruptions.get_corruption_names("all")} == set(IMAGENET_C)
    for kind in ("contrast", "defocus_blur", "jpeg_compression", "pixelate", "saturate"):
        expected = imagecorruptions.corrupt(np.asarray(sample().image), 3, kind)
        assert np.array_equal(np.asarray(corrupt(sample(), f"image:imagenet_c/{kind}", 3).image), expected)


def test_imagenet_c_refuses_small_images_by_name():
    for size in ((31, 64), (64, 31), (1, 1)):
        with pytest.raises(ValueError, match=rf"'sample-0'.*32x32.*{size[0]}x{size[1]}"):
            corrupt(sample(image=picture(size=size)), "image:imagenet_c/fog")


@pytest.mark.parametrize("name", IMAGENET_C)
@pytest.mark.parametrize("size", [(32, 32), (33, 150)])
def test_imagenet_c_keeps_unusual_sizes_and_modes(name, size):
    for image in (picture(size=size), Image.new("L", size), picture(size=size).convert("RGBA")):
        assert corrupt(sample(image=image), f"image:{name}", 1).image.size == size


def test_a_spatter_without_drops_leaves_the_image():
    clean = sample(image=picture(size=(32, 32)))
    changes = [
        abs(pixels(corrupt(clean.replace(id=str(i)), "image:imagenet_c/spatter", 1)) - pixels(clean)).max()
        for i in range(200)
    ]
    assert min(changes) == 0
    assert all(np.isfinite(changes))


def test_imagenet_c_without_its_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "imagecorruptions":
            raise ModuleNotFoundError("No module named 'imagecorruptions'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"modeling-dms\[eval\]"):
        corrupt(sample(), "image:imagenet_c/snow")
    assert corrupt(sample(), "image:noise").image is not None


def test_threads_do_not_disturb_each_other():
    jobs = [(sample(i, id=str(i)), f"image:{name}") for i in range(3) for name in IMAGENET_C]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda job: facts(corrupt(*job)), jobs))
    assert threaded == [facts(corrupt(*job)) for job in jobs]


def test_damage_composes():
    clean, other = sample(0), sample(1)
    assert clean.damage == (0.0, 0.0)
    assert corrupt(clean, "image:missing", 1).damage == (1.0, 0.0)
    assert corrupt(clean, "image:mismatch", 1, other).damage == (1.0, 0.0)
    assert corrupt(clean, "text:missing").damage == (0.0, 1.0)
    assert corrupt(clean, "text:mismatch", 1, other).damage == (0.0, 1.0)
    assert corrupt(corrupt(clean, "image:blur", 2), "text:typos", 4).damage == (0.4, 0.8)
    assert corrupt(corrupt(clean, "image:blur", 4), "image:noise", 1).damage == (0.8, 0.0)
    assert corrupt(sample(context=" "), "text:typos", 5).damage == (0.0, 0.0)
    assert corrupt(sample(image=None), "image:imagenet_c/fog", 5).damage == (0.0, 0.0)


def test_draws_of_earlier_versions_stay():
    # results were published with them
    assert corrupt(sample(), "text:typos", 3).context == "k utd eirclc, nembsn 0."
    assert corrupt(sample(), "text:shuffle_words", 3).context == "number 0. red circle, a"
    assert int(pixels(corrupt(sample(image=Image.new("RGB", (8, 8))), "image:noise", 3)).sum()) == 5737


# ---- text


# numpy's strings end at a null character, which no context holds
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=60)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, severity=st.integers(1, 5), sample_id=st.text(max_size=5))
def test_text_corruptions_of_any_text(text, severity, sample_id):
    clean = sample(id=sample_id, context=text)
    out = {kind: corrupt(clean, f"text:{kind}", severity).context for kind in TEXT_CORRUPTIONS}
    assert out == {kind: corrupt(clean, f"text:{kind}", severity).context for kind in TEXT_CORRUPTIONS}
    assert all(type(corrupted) is str for corrupted in out.values())
    words = text.split()
    if not words:
        assert set(out.values()) == {text}
        return
    assert Counter(out["shuffle_words"].split()) == Counter(words)
    assert len(out["random_words"].split()) == len(words)
    kept = iter(words)
    assert out["drop_words"]
    assert all(word in kept for word in out["drop_words"].split())
    assert len(out["typos"]) == len(text)
    assert all(new == old for new, old in zip(out["typos"], text, strict=True) if not old.isalpha())
    assert [Counter(word) for word in out["scramble"].split()] == [Counter(word) for word in words]


@pytest.mark.parametrize("text", ["circle", "円", "🔑", "naïve ключ 日本語 🔑", "a", "..."])
@pytest.mark.parametrize("kind", TEXT_CORRUPTIONS)
def test_text_corruptions_leave_some_text(kind, text):
    for severity in range(1, 6):
        made = corrupt(sample(context=text), f"text:{kind}", severity)
        assert made.context.strip()
        assert made.damage == (0.0, severity / 5)


# ---- families and the configuration


def test_families_partition_the_names():
    listed = [name for modality, families in FAMILIES.items() for name in names_in(modality, families)]
    assert sorted(listed) == sorted(NAMES)
    assert len(set(NAMES)) == len(IMAGE_CORRUPTIONS) + len(IMAGENET_C) + len(TEXT_CORRUPTIONS) + 4
    for modality, families in FAMILIES.items():
        for family in families:
            assert {family_of(name) for name in names_in(modality, [family])} == {family}


def test_every_kind_says_what_it_must_be_unseen_by():
    for name in NAMES:
        modality, kind = name.split(":")
        known = self_made_families(name)
        assert set(known) <= set(damage.FAMILIES[modality == "text"])
        assert bool(known) == (kind not in ("missing", "mismatch")), name
    assert self_made_families("image:imagenet_c/shot_noise") == ("noise",)
    assert self_made_families("image:dark") == self_made_families("image:imagenet_c/fog") == ("exposure",)
    assert self_made_families("image:invert") == self_made_families("image:channel_swap") == ("color",)
    assert self_made_families("text:typos") == ("misspelt",)
    assert self_made_families("text:shuffle_words") == ("shuffle",)


def test_unknown_names_are_told_the_nearest_or_all_that_are_accepted():
    with pytest.raises(ValueError, match=r"'image:gaussian_noise', did you mean image:imagenet_c/gaussian_noise"):
        family_of("image:gaussian_noise")
    with pytest.raises(ValueError, match=r"'rain', expected one of image:noise.*text:mismatch"):
        family_of("rain")
    with pytest.raises(ValueError, match=r"'fuzz'.*weather"):
        names_in("image", ["noise", "fuzz"])
    with pytest.raises(ValueError, match=r"'weather'.*characters"):
        names_in("text", ["weather"])
    with pytest.raises(ValueError, match="image, text"):
        names_in("audio", ["noise"])
    with pytest.raises(ValueError, match=r"did you mean .*image:imagenet_c/fog"):
        corrupt(sample(), "image:imagenet_c/fgo")


def test_the_default_configuration_divides_all_families():
    config = CorruptionConfig()
    for modality, families in FAMILIES.items():
        divided = [*config.families(modality, "seen"), *config.families(modality, "held out")]
        assert sorted(divided) == sorted(families)
    ModalityDropout.of([sample()], config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_rate": -0.1}, "image_rate"),
        ({"text_rate": 1.5}, "text_rate"),
        ({"both_rate": float("nan")}, "both_rate"),
        ({"image_rate": 0.6, "text_rate": 0.6}, "image_rate, text_rate, both_rate must sum"),
        ({"image_families": ["snowstorm"]}, "image_families.*snowstorm"),
        ({"held_out_text_families": ["weather"]}, "held_out_text_families.*weather"),
        ({"image_families": ["noise", "weather"]}, "held_out_image_families: weather seen by image_families"),
        ({"text_families": ["mismatch"]}, "held_out_text_families: mismatch seen by text_families"),
    ],
)
def test_a_wrong_configuration_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        CorruptionConfig(**changes)


def test_the_configuration_is_read_from_the_command_line():
    (config,) = HfArgumentParser(CorruptionConfig).parse_args_into_dataclasses(
        ["--image_rate", "0.1", "--image_families", "noise", "digital", "--held_out_image_families", "color"]
    )
    assert (config.image_rate, config.image_families) == (0.1, ["noise", "digital"])
    assert config.families("image", "held out") == ["color"]
    assert all(field.metadata["help"] for field in fields(CorruptionConfig))


# ---- modality dropout


def dropout(samples, image_rate=0.3, text_rate=0.3, **changes):
    chosen = {
        "image_families": ["noise", "blank", "weather", "missing", "mismatch"],
        "text_families": ["characters", "random_words", "missing", "mismatch"],
        "both_rate": 0.2,
    }
    return ModalityDropout(samples, image_rate, text_rate, **(chosen | changes))


# one process and one thread would hide a generator they share
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (1, 2), (4, 2)])
def test_batches_and_workers_do_not_matter(batch_size, workers):
    samples = [sample(i) for i in range(24)]
    data = dropout(samples)
    loader = DataLoader(
        data, batch_size=batch_size, num_workers=workers, collate_fn=only, persistent_workers=workers > 0
    )
    epochs = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        alone = dropout(samples)
        alone.set_epoch(epoch)
        epochs.append([facts(made) for batch in loader for made in batch])
        assert epochs[-1] == [facts(alone[i]) for i in range(24)]
    assert epochs[0] != epochs[1]


def test_the_order_of_the_samples_does_not_matter():
    samples = [sample(i) for i in range(24)]
    forward, backward = dropout(samples), dropout(samples[::-1])
    assert [facts(forward[i]) for i in range(24)] == [facts(backward[23 - i]) for i in range(24)]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_callback_sets_the_epoch_in_any_number_of_processes(processes):
    samples = [sample(i) for i in range(8)]
    loader = prepare_data_loader(
        DataLoader(dropout(samples), batch_size=2, shuffle=True, collate_fn=only),
        num_processes=processes,
        process_index=0,
        put_on_device=False,
        use_seedable_sampler=True,
    )
    EpochCallback().on_epoch_begin(None, TrainerState(epoch=3.0), None, train_dataloader=loader)
    expected = dropout(samples)
    expected.set_epoch(3)
    assert facts(loader.dataset[5]) == facts(expected[5])
    assert loader.dataset.epoch == 3


def test_epochs_and_seeds_change_the_corruption_too():
    data = dropout([sample(0), sample(1)], 1.0, 0.0, both_rate=0.0, image_families=["noise"], severities=(3,))
    first = pixels(data[0])
    data.set_epoch(1)
    assert not np.array_equal(pixels(data[0]), first)
    data.set_epoch(0)
    assert np.array_equal(pixels(data[0]), first)
    data.seed = 1
    assert not np.array_equal(pixels(data[0]), first)


def test_a_pickled_data_set_draws_the_same():
    # as workers get it that are spawned, not forked
    data = dropout([sample(i) for i in range(8)])
    data.set_epoch(2)
    copy = pickle.loads(pickle.dumps(data))
    assert [facts(copy[i]) for i in range(8)] == [facts(data[i]) for i in range(8)]


def test_rates_hold_and_something_is_always_left():
    image = picture(size=(8, 8))
    samples = [sample(i).replace(image=image.copy()) for i in range(30)]
    samples += [sample(i, image=None if i % 2 else image, context=" " if i % 2 == 0 else "red") for i in range(30, 40)]
    mild = {"image_families": ["occlusion", "blank", "missing"], "severities": (1, 2, 3, 4)}
    data = dropout(samples, 0.3, 0.25, both_rate=0.15, **mild)
    count = Counter()
    for epoch in range(100):
        data.set_epoch(epoch)
        for i, clean in enumerate(samples):
            made = data[i]
            assert (made.id, made.question, made.answers) == (clean.id, clean.question, clean.answers)
            assert made.image is not None or (made.context or "").strip()
            if i < 30:
                count[tuple(damage > 0 for damage in made.damage)] += 1
                # without severity 5, damage 1 is what has been replaced
                assert made.damage != (1.0, 1.0)
            else:
                # what is absent is not called damaged
                assert made.damage[0 if clean.image is None else 1] == 0
    shares = {case: number / 3000 for case, number in count.items()}
    expected = {(True, False): 0.3, (False, True): 0.25, (True, True): 0.15, (False, False): 0.3}
    assert shares == pytest.approx(expected, abs=0.03)


def test_families_are_equally_frequent_and_kinds_within_them():
    seen = {"image_families": ["noise", "missing"], "severities": (2,), "both_rate": 0.0}
    data = dropout([sample(i) for i in range(300)], 1.0, 0.0, **seen)
    made = [data[i] for i in range(300)]
    assert sum(one.image is None for one in made) / 300 == pytest.approx(0.5, abs=0.1)
    # what replaces the modality has no mild form
    assert {one.damage for one in made} == {(1.0, 0.0), (0.4, 0.0)}


def test_mismatch_takes_another_samples_modality_of_another_answer():
    samples = [sample(i) for i in range(12)]
    # one image with several questions
    samples += [samples[0].replace(id=f"again-{i}", answers=(str(i),)) for i in range(6)]
    data = dropout(samples, 0.0, 1.0, text_families=["mismatch"], both_rate=0.0)
    partners = {made.context: made.answers for made in samples}
    for i, clean in enumerate(samples):
        assert data[i].context != clean.context
        assert data[i].damage == (0.0, 1.0)
        if i < 12:
            assert partners[data[i].context] != clean.answers
    same = [sample(i, answers=("yes",)) for i in range(4)]
    assert dropout(same, 0.0, 1.0, text_families=["mismatch"], both_rate=0.0)[0].context != same[0].context
    alone = dropout(same[:1], 0.0, 1.0, text_families=["mismatch"], both_rate=0.0)[0]
    assert facts(alone) == facts(same[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_rate": 1.1}, "image_rate"),
        ({"image_rate": 0.7}, "sum to at most 1"),
        ({"image_families": []}, "both_rate"),
        ({"text_families": [], "both_rate": 0.0}, "text_rate"),
        ({"image_families": ["missing"], "text_families": ["mismatch"]}, "both_rate"),
        ({"image_families": ["rain"]}, "rain"),
        ({"severities": (0, 1)}, "severities"),
        ({"severities": ()}, "severities"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dropout([sample(0), sample(1)], **changes)


def test_two_samples_of_one_id_are_refused():
    with pytest.raises(ValueError, match="'sample-3'"):
        dropout([sample(3), sample(2), sample(3)])
