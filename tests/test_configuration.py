"""Configuration: defaults, what is refused and how, JSON round trips alone and inside the two composites."""

import dataclasses
import functools
import json
import logging
import re
import typing

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Blip2Config, InternVLConfig, LlavaConfig, PreTrainedConfig

from modeling_dms import DMSBlip2Config, DMSConfig, DMSInternVLConfig, DMSLlavaConfig, __version__
from tests import tiny


bounded = settings(max_examples=25, deadline=None, derandomize=True)

LITERALS = {
    "scheduler": ("uniform", "rule", "learned", "entropy", "energy"),
    "fusion": ("attention", "embedding"),
    "uncertainty": ("mutual_information", "variance"),
    "conflict_prior": ("vision", "text", "learned", None),
}
# field: (accepted values at the edges, refused values just outside)
INTEGERS = {
    "shared_size": ([1, 4096], [0, -1]),
    "mc_samples": ([2, 1000], [1, 0]),
    "mc_tokens": ([2, 10**6], [1, 0]),
    "mc_seed": ([0, 2**63 - 1], [-1, 2**63]),
    "subspace_size": ([1], [0]),
    "scheduler_hidden_size": ([1], [0]),
}
NUMBERS = {
    "mc_dropout": ([0, 0.0, 0.9], [-0.01, 0.91, 1]),
    "kappa": ([0, 0.0, 100], [-0.1]),
    "weight_floor": ([0, 0.49], [-0.01, 0.5, 1]),
    "false_alarm_rate": ([0, 0.5], [-0.01, 0.51]),
    "temperature": ([0.01, 10], [0, 0.0, -1.0]),
    "contrastive_temperature": ([0.01, 10], [0, 0.0, -1.0]),
    "lambda_mwc": ([0, 10], [-0.1]),
    "lambda_unimodal": ([0, 10], [-0.1]),
    "lambda_consistency": ([0, 10], [-0.1]),
    "lambda_schedule": ([0, 10], [-0.1]),
}
FLAGS = ["normalize_entropy"]
LAYERS = ["vision_layers", "text_layers"]
SIGNALS = ["scheduler_signals"]
# every field with a value other than its default
OTHER = {
    "scheduler": "learned",
    "fusion": "embedding",
    "shared_size": 17,
    "normalize_entropy": False,
    "uncertainty": "variance",
    "mc_samples": 3,
    "mc_tokens": 7,
    "mc_dropout": 0.25,
    "mc_seed": 5,
    "vision_layers": [0, 3],
    "text_layers": [1],
    "subspace_size": 9,
    "kappa": 1.5,
    "weight_floor": 0.02,
    "conflict_prior": "text",
    "false_alarm_rate": 0.2,
    "scheduler_hidden_size": 8,
    "scheduler_signals": ["typicality"],
    "temperature": 2.0,
    "lambda_mwc": 0.3,
    "lambda_unimodal": 0.4,
    "lambda_consistency": 0.6,
    "lambda_schedule": 0.7,
    "contrastive_temperature": 0.5,
}
COMPOSITES = {"dms_llava": DMSLlavaConfig, "dms_internvl": DMSInternVLConfig, "dms_blip_2": DMSBlip2Config}
BACKBONES = {"dms_llava": LlavaConfig, "dms_internvl": InternVLConfig, "dms_blip_2": Blip2Config}


def own_fields():
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [field for field in dataclasses.fields(DMSConfig) if field.name not in inherited]


def values(config):
    return {name: getattr(config, name) for name in OTHER}


@pytest.fixture
def logged(caplog):
    """What is logged at level warning or above, by transformers as well, whose loggers do not propagate."""
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)
    yield caplog
    transformers.removeHandler(caplog.handler)


# ---- defaults


def test_the_tables_of_this_file_know_every_field():
    names = {field.name for field in own_fields()} - {"modeling_dms_version"}

    assert names == {*LITERALS, *INTEGERS, *NUMBERS, *FLAGS, *LAYERS, *SIGNALS}
    assert names == set(OTHER)
    assert not [name for name, value in values(DMSConfig()).items() if value == OTHER[name]]


def test_the_documented_defaults_are_the_defaults():
    documented = re.findall(
        r"^ +(\w+) \(`[^`]+`, (?:defaults to `?([^`)]+)`?|\*optional\*)\)", DMSConfig.__doc__, re.M
    )
    config = DMSConfig()
    for name, default in documented:
        assert getattr(config, name) == (json.loads(default.lower()) if default else None), name
    assert len(documented) >= 20


def test_the_defaults_that_the_method_rests_on():
    config = DMSConfig()

    assert config.scheduler == "rule"
    assert config.fusion == "attention"
    assert config.uncertainty == "mutual_information"
    assert config.normalize_entropy
    assert config.conflict_prior is None
    assert 0 < config.weight_floor < 0.2
    losses = ("mwc", "unimodal", "consistency", "schedule")
    assert [getattr(config, f"lambda_{loss}") for loss in losses] == [0.1] * 4
    assert config.modeling_dms_version == __version__
    assert config.model_type == "dms"


@bounded
@given(rate=st.floats(0, 0.5), prior=st.sampled_from(LITERALS["conflict_prior"]))
def test_all_alarms_together_have_the_false_alarm_rate(rate, prior):
    config = DMSConfig(false_alarm_rate=rate, conflict_prior=prior)
    alarms = 2 if prior is None else 3

    assert alarms * config.alarm_rate == pytest.approx(rate)
    assert isinstance(DMSConfig(false_alarm_rate=0).alarm_rate, float)
    assert "alarm_rate" not in config.to_dict()


# ---- what is refused


@pytest.mark.parametrize("name", LITERALS)
def test_choices_take_the_listed_values_and_name_them_when_given_another(name):
    for value in LITERALS[name]:
        assert getattr(DMSConfig(**{name: value}), name) == value
    for wrong in ["other", 1, True, *([] if None in LITERALS[name] else [None])]:
        with pytest.raises(StrictDataclassError) as error:
            DMSConfig(**{name: wrong})
        message = str(error.value)
        assert name in message
        assert str(wrong) in message
        assert all(repr(value) in message for value in LITERALS[name] if value is not None)


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_ranges_take_their_edges_and_refuse_what_lies_outside(name):
    accepted, refused = {**INTEGERS, **NUMBERS}[name]
    for value in accepted:
        assert getattr(DMSConfig(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(
            StrictDataclassError, match=rf"DMSConfig\.{name} must lie in .*, got {re.escape(repr(value))}"
        ):
            DMSConfig(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_must_be_finite(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        DMSConfig(**{name: value})


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (INTEGERS, ["8", 8.0, True, None]),
        (NUMBERS, ["0.1", True, None]),
        (FLAGS, [1, "true", None]),
        (LAYERS, [3, (1, 2), ["1"], [1.0]]),
    ],
)
def test_wrong_types_are_refused_by_name(names, wrong):
    for name in names:
        for value in wrong:
            with pytest.raises(StrictDataclassError, match=name):
                DMSConfig(**{name: value})


@pytest.mark.parametrize("given", [[], ["entropy"], ["damage", "conflict"]])
def test_signals_that_there_are_not_are_refused(given):
    with pytest.raises(StrictDataclassError, match=r"DMSConfig\.scheduler_signals.*confidence.*damage"):
        DMSConfig(scheduler_signals=given)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layers", [[], [-1], [2, 2], [1, -3]])
def test_layers_must_be_distinct_numbers_from_0(name, layers):
    with pytest.raises(StrictDataclassError, match=rf"DMSConfig\.{name} must be distinct.*{re.escape(repr(layers))}"):
        DMSConfig(**{name: layers})


def test_assignments_are_checked_at_once_and_ranges_before_saving(tmp_path):
    config = DMSConfig()
    with pytest.raises(StrictDataclassError, match="scheduler"):
        config.scheduler = "other"
    config.kappa = -1
    with pytest.raises(StrictDataclassError, match="kappa"):
        config.save_pretrained(tmp_path)


# ---- round trips


@pytest.mark.parametrize("fields", [{}, OTHER], ids=["defaults", "all changed"])
def test_a_configuration_survives_its_file_and_its_dictionary(fields, tmp_path, logged):
    config = DMSConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = DMSConfig.from_pretrained(tmp_path)
    rebuilt = DMSConfig(**json.loads(json.dumps(config.to_dict())))

    assert values(loaded) == values(rebuilt) == {**values(DMSConfig()), **fields}
    assert loaded.to_dict() == config.to_dict()
    assert not logged.records
    assert json.loads((tmp_path / "config.json").read_text())["modeling_dms_version"] == __version__


@bounded
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.sampled_from(LITERALS[name]) for name in LITERALS},
            **{name: st.sampled_from(accepted) for name, (accepted, _) in {**INTEGERS, **NUMBERS}.items()},
            **{name: st.booleans() for name in FLAGS},
            **{name: st.none() | st.lists(st.integers(0, 30), min_size=1, unique=True) for name in LAYERS},
            **{name: st.none() | st.just(["consistency", "damage"]) for name in SIGNALS},
        },
    )
)
def test_any_accepted_combination_survives_json(fields):
    config = DMSConfig(**fields)
    rebuilt = DMSConfig.from_dict(json.loads(config.to_json_string()))

    assert values(rebuilt) == values(config)
    assert fields.items() <= values(rebuilt).items()


# ---- unknown fields


def assert_warned(logged, field, version):
    warnings = [record.getMessage() for record in logged.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, warnings
    assert field in warnings[0]
    assert f"modeling_dms {version}" in warnings[0]
    assert f"this is {__version__}" in warnings[0]


@pytest.mark.parametrize("way", ["constructor", "dictionary", "file"])
def test_an_unknown_field_is_dropped_with_a_warning_that_names_both_versions(way, tmp_path, logged):
    written = {**DMSConfig(kappa=2.0).to_dict(), "from_the_future": 3, "modeling_dms_version": "9.8.7"}
    if way == "constructor":
        config = DMSConfig(**written)
    elif way == "dictionary":
        config = DMSConfig.from_dict(written)
    else:
        (tmp_path / "config.json").write_text(json.dumps(written))
        config = DMSConfig.from_pretrained(tmp_path)

    assert_warned(logged, "from_the_future", "9.8.7")
    assert not hasattr(config, "from_the_future")
    assert "from_the_future" not in config.to_dict()
    assert config.kappa == 2.0
    assert config.modeling_dms_version == __version__


@pytest.mark.parametrize(
    ("name", "as_now", "others"),
    [
        ("mc_depth", "head", ["encoder"]),
        ("scheduler_embeddings", False, [True]),
        ("consistency", "sharpen", ["additive"]),
        ("arbitration_rate", 0.05, [0.0, 0.3]),
    ],
)
def test_a_choice_that_is_gone_is_news_only_where_it_was_made(name, as_now, others, logged):
    config = DMSConfig.from_dict({name: as_now, "modeling_dms_version": "0.0.9"})
    assert not logged.records
    assert not hasattr(config, name)
    assert name not in config.to_dict()
    for other in others:
        logged.clear()
        DMSConfig.from_dict({name: other, "modeling_dms_version": "0.0.9"})
        assert_warned(logged, name, "0.0.9")


def test_fields_of_every_transformers_configuration_are_not_unknown(logged):
    DMSConfig(architectures=["X"], output_attentions=False, torch_dtype="float32", transformers_version="5.0.0")

    assert not logged.records


# ---- layers


@pytest.mark.parametrize(
    ("modality", "depth", "layers"),
    [
        ("text", 32, [0, 1]),
        ("text", 1, [0, 1]),
        ("vision", 24, [0, 5, 10, 14, 19]),
        ("vision", 2, [0, 1, 2]),
        ("vision", 1, [0, 1]),
    ],
)
def test_default_layers_of_shallow_and_deep_backbones(modality, depth, layers):
    assert DMSConfig().layers_of(modality, depth) == layers


@pytest.mark.parametrize(("depth", "layers"), [(12, [0, 1, 6, 12]), (3, [0, 1, 3]), (2, [0, 1, 2]), (1, [0, 1])])
def test_default_layers_of_an_encoder_reach_its_last(depth, layers):
    assert DMSConfig().layers_of("text", depth, causal=False) == layers
    assert DMSConfig().layers_of("vision", depth, causal=False) == DMSConfig().layers_of("vision", depth)
    assert DMSConfig(text_layers=[1]).layers_of("text", depth, causal=False) == [1]


@bounded
@given(depth=st.integers(1, 80))
def test_default_layers_exist_and_lie_where_they_should(depth):
    vision, text = (DMSConfig().layers_of(modality, depth) for modality in ("vision", "text"))
    for layers in (vision, text):
        assert layers == sorted(set(layers))
        assert 0 <= layers[0] <= layers[-1] <= depth
    assert text == [0, 1]
    assert vision[0] == 0
    if depth >= 10:
        assert len(vision) == 5
        assert 0.1 * depth <= vision[1] < 0.5 * depth < vision[-1] <= 0.9 * depth


def test_configured_layers_are_sorted_and_must_exist():
    config = DMSConfig(vision_layers=[5, 0, 3], text_layers=[2])

    assert config.layers_of("vision", 5) == [0, 3, 5]
    assert config.layers_of("text", 2) == [2]
    with pytest.raises(ValueError, match=r"DMSConfig\.vision_layers.*4 layers.*\[0, 3, 5\]"):
        config.layers_of("vision", 4)
    with pytest.raises(ValueError, match=r"DMSConfig\.text_layers.*1 layers.*\[2\]"):
        config.layers_of("text", 1)


# ---- composites


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_a_composite_has_a_dms_configuration_of_its_own(model_type):
    first, second = COMPOSITES[model_type](), COMPOSITES[model_type]()

    assert first.model_type == model_type
    assert isinstance(first, BACKBONES[model_type])
    assert values(first.dms_config) == values(DMSConfig())
    first.dms_config.kappa = 1.0
    assert second.dms_config.kappa == DMSConfig().kappa


@pytest.mark.parametrize("model_type", COMPOSITES)
@pytest.mark.parametrize("form", [dict, DMSConfig], ids=["dict", "DMSConfig"])
def test_a_composite_survives_its_file_and_its_dictionary(form, model_type, tmp_path, logged):
    config = COMPOSITES[model_type](dms_config=form(**OTHER), image_token_id=77)
    config.save_pretrained(tmp_path)
    loaded = [
        COMPOSITES[model_type].from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        COMPOSITES[model_type](**json.loads(config.to_json_string(use_diff=False))),
    ]

    assert not logged.records
    for other in loaded:
        assert type(other) is COMPOSITES[model_type]
        assert isinstance(other.dms_config, DMSConfig)
        assert values(other.dms_config) == OTHER
        assert other.image_token_id == 77
        assert other.to_dict()["dms_config"] == config.to_dict()["dms_config"]
        assert other.text_config.to_dict() == config.text_config.to_dict()
        assert other.vision_config.to_dict() == config.vision_config.to_dict()


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_a_file_of_the_vanilla_backbone_gets_the_defaults_without_a_warning(model_type, tmp_path, logged):
    BACKBONES[model_type](image_token_id=77).save_pretrained(tmp_path)
    config = COMPOSITES[model_type].from_pretrained(tmp_path)

    assert not logged.records
    assert config.model_type == model_type
    assert config.image_token_id == 77
    assert values(config.dms_config) == values(DMSConfig())


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_faults_of_a_nested_configuration_are_named(model_type, logged):
    with pytest.raises(StrictDataclassError, match=r"scheduler.*'learned'"):
        COMPOSITES[model_type](dms_config={"scheduler": "other"})
    with pytest.raises(StrictDataclassError, match="weight_floor"):
        COMPOSITES[model_type](dms_config={"weight_floor": 0.6})
    with pytest.raises((StrictDataclassError, TypeError), match="dms_config"):
        COMPOSITES[model_type](dms_config="rule")
    config = COMPOSITES[model_type](dms_config={"from_the_future": 3, "modeling_dms_version": "9.8.7"})
    assert_warned(logged, "from_the_future", "9.8.7")
    assert "from_the_future" not in config.to_dict()["dms_config"]


# ---- any file

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**30, 2.5, float("nan"), float("inf"), "", "rule", "llama", "\ud800"])
    | st.lists(st.none() | st.integers(-1, 2) | st.just("a"), max_size=2)
    | st.dictionaries(st.sampled_from(["a", "0", "model_type"]), st.none() | st.integers(-1, 2), max_size=1)
)


def places(fields, path=()):
    """Of every field, also those of nested configurations."""
    for name, value in fields.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def changed(fields, path, value):
    inner = value if len(path) == 1 else changed(fields[path[0]], path[1:], value)
    return {**fields, path[0]: inner}


@functools.cache
def written(name):
    """A complete configuration as its file holds it, and the places of its fields."""
    config = DMSConfig() if name == "dms" else tiny.config(name)
    fields = json.loads(config.to_json_string(use_diff=False))
    return type(config), fields, [*places(fields), ("from_the_future",), ("torch_dtype",), ("label2id",)]


@pytest.mark.parametrize("name", ["dms", "llava-llama", "internvl-qwen3", "blip2-opt"])
@bounded
@given(data=st.data(), value=VALUES)
def test_a_changed_field_is_read_or_named(name, data, value):
    cls, fields, known = written(name)
    path = data.draw(st.sampled_from(known))
    try:
        config, error = cls.from_dict(changed(fields, path, value)), ""
    except ValueError as raised:
        config, error = None, str(raised)
    # of sizes that do not fit each other it may be the other one
    named = error.split(":")[0].split(".")[:2]
    assert type(config) is cls or named == [cls.__name__, path[0]], (path, value, error)


@pytest.mark.parametrize("content", ["", "[]", "3", '"x"', "{", "[" * 100_000, '{"a":' * 50_000, "\ud83d"])
@pytest.mark.parametrize("cls", [DMSConfig, *COMPOSITES.values()])
def test_a_file_that_holds_no_configuration_is_refused(cls, content, tmp_path):
    (tmp_path / "config.json").write_text(content, errors="surrogatepass")
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        cls.from_pretrained(tmp_path)


def test_every_choice_is_typed_as_one():
    typed = {}
    for field in own_fields():
        for part in (field.type, *typing.get_args(field.type)):
            if typing.get_origin(part) is typing.Literal:
                typed[field.name] = typing.get_args(part)

    assert typed == {name: tuple(v for v in accepted if v is not None) for name, accepted in LITERALS.items()}
