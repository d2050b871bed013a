"""What fusion promises: uniform weights change nothing, weight 0 masks, a batch equals its rows, kernels and caches
agree."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from modeling_dms import modeling_dms_blip_2
from modeling_dms._compat import CACHE
from modeling_dms.steer.bias import key_bias
from tests import tiny


ATTENTION = ("sdpa", "eager")
PADDING = ("none", "left", "right")
STARTS = (tiny.BOS, 5)  # neutral, and a word: the attention sink belongs to no modality, or to the text
KINDS = ("pairs", "mixed")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, measured against the largest value."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def starting_with(token: int, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = inputs["input_ids"]
    return {**inputs, "input_ids": ids.masked_fill(ids == tiny.BOS, token)}


def answers(logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Logits at the positions that count; all of them where the backbone has a decoder of its own."""
    return logits[keep] if logits.shape[:2] == keep.shape else logits


def vanilla_positions(backbone, inputs):
    """The position ids that the vanilla class gives these inputs, to be kept when the mask changes."""
    mask = inputs["attention_mask"]
    if backbone == "blip2-t5":  # relative positions
        return {}
    if backbone == "blip2-opt":
        return {"position_ids": mask.cumsum(1) * mask - 1}
    return {"position_ids": torch.arange(mask.shape[1]).expand_as(mask)}


def masked_reference(backbone, attention, inputs, keep):
    """The vanilla class with positions masked out of the attention, and position ids as if they were not."""
    reference = {**inputs, **vanilla_positions(backbone, inputs), "attention_mask": keep.long()}
    return tiny.vanilla(backbone, attention)(**reference).logits


# ---- uniform weights


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_static_weights_are_the_vanilla_class(backbone, attention, padding):
    for kind in KINDS:
        inputs = tiny.prompts(backbone, kind, padding)
        expected = tiny.vanilla(backbone, attention)(**inputs).logits
        present = torch.stack([(inputs["input_ids"] == tiny.IMAGE).any(1), torch.tensor(has_text(backbone, kind))], 1)
        if padding == "none":
            present[:, 1] = True
        uniform = present / present.sum(1, keepdim=True)
        for scheduler in ("uniform", "rule", "learned"):
            out = tiny.shared(backbone, attention, scheduler=scheduler)(**inputs)
            assert torch.equal(out.logits, expected), scheduler
            assert torch.equal(out.modality_weights, uniform), scheduler
        out = tiny.shared(backbone, attention, scheduler="entropy")(**inputs, modality_weights=uniform)
        assert torch.equal(out.logits, expected)
        assert torch.equal(out.modality_weights, uniform)


def has_text(backbone, kind):
    return [any(part != "i" for part in row) for row in tiny.rows_of(backbone, kind)]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backbone", tiny.LLAVA_SHAPED)
def test_static_weights_are_the_vanilla_class_with_a_cache(backbone, attention, padding):
    inputs = tiny.prompts(backbone, "mixed", padding)
    tokens = torch.arange(10, 10 + 2 * len(inputs["input_ids"])).view(2, -1, 1)
    results = []
    for scheduler in (None, "uniform", "rule"):
        if scheduler is None:
            model = tiny.vanilla(backbone, attention)
        else:
            model = tiny.shared(backbone, attention, scheduler=scheduler)
        out = model(**inputs, use_cache=True)
        logits, mask = [out.logits], inputs["attention_mask"]
        carried = {}
        if scheduler == "rule":
            carried = {"modality_weights": out.modality_weights, "modality_ids": out.modality_ids}
        cache: Cache = out[CACHE]
        for step in tokens:
            mask = F.pad(mask, (0, 1), value=1)
            out = model(input_ids=step, attention_mask=mask, **{CACHE: cache}, **carried)
            logits.append(out.logits)
        results.append(torch.cat(logits, 1))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_every_field_of_the_vanilla_output_survives(backbone):
    inputs = tiny.prompts(backbone, "mixed", "left")
    asked = {"output_attentions": True, "output_hidden_states": True}
    out = tiny.shared(backbone, "eager")(**inputs, **asked)
    expected = tiny.vanilla(backbone, "eager")(**inputs, **asked)

    def assert_same(actual, wanted, name):
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(actual, wanted), name
        elif isinstance(wanted, dict):
            for key, value in wanted.items():
                assert_same(actual[key], value, f"{name}.{key}")
        elif isinstance(wanted, tuple):
            assert len(actual) == len(wanted), name
            for index, value in enumerate(wanted):
                assert_same(actual[index], value, f"{name}.{index}")

    # DMS keeps hidden states there that the vanilla class does not
    skipped = {"vision_outputs", "image_outputs"}
    for name, value in expected.items():
        assert name in out
        if name not in skipped:
            assert_same(out[name], value, name)
    if "image_outputs" in expected:
        assert_same(out.image_outputs.pooler_output, expected.image_outputs.pooler_output, "pooler_output")
    as_tuple = tiny.shared(backbone, "eager")(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.logits)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_embeddings_instead_of_ids(backbone, attention):
    inputs = tiny.prompts(backbone, "mixed", "left")
    model = tiny.shared(backbone, attention, scheduler="entropy")
    weights = tiny.uneven(len(inputs["input_ids"]))
    expected = model(**inputs, modality_weights=weights)
    ids = inputs.pop("input_ids")
    embedded = model(
        **inputs,
        inputs_embeds=model.get_input_embeddings()(ids),
        modality_ids=expected.modality_ids,
        modality_weights=weights,
    )
    assert torch.equal(embedded.logits, expected.logits)
    assert torch.equal(embedded.modality_weights, expected.modality_weights)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_embeddings_alone_with_static_weights(backbone):
    """The vanilla classes find the placeholders by their embedding; where nothing is weighed, so can these."""
    inputs = tiny.prompts(backbone, "pairs", "left")
    model, vanilla = tiny.shared(backbone, scheduler="uniform"), tiny.vanilla(backbone)
    inputs["inputs_embeds"] = vanilla.get_input_embeddings()(inputs["input_ids"])
    ids = inputs.pop("input_ids")
    if backbone in tiny.LLAVA_SHAPED:
        expected = vanilla(**inputs)
    else:
        expected = vanilla(**inputs, input_ids=ids)  # it makes them a positional argument
    assert torch.equal(model(**inputs).logits, expected.logits)


# ---- weights that matter


def additive_mask(backbone, inputs, bias):
    """Causal mask (unless the backbone is bidirectional), padding and key bias, written out by hand."""
    keep = inputs["attention_mask"].bool()[:, None, None]
    if backbone != "blip2-t5":
        length = keep.shape[-1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        keep = keep & (distance >= 0)
        if backbone == "llava-mistral":
            keep = keep & (distance < tiny.WINDOW)
    return torch.where(keep, bias[:, None, None], torch.finfo(torch.float32).min)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backbone", [name for name in tiny.BACKBONES if name != "llava-qwen2"])
def test_weights_add_log_2w_to_the_keys(backbone, attention, padding, start):
    inputs = starting_with(start, tiny.prompts(backbone, "pairs", padding))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    weights = tiny.uneven(len(ids))
    out = tiny.shared(backbone, attention)(**inputs, modality_weights=weights)
    text = (ids != tiny.IMAGE) & (ids != tiny.BOS) & (ids != tiny.PAD)
    assert torch.equal(out.modality_ids, torch.where(ids == tiny.IMAGE, 1, torch.where(text, 2, 0)))
    log = (2 * weights).log()
    bias = torch.where(ids == tiny.IMAGE, log[:, :1], torch.where(text, log[:, 1:], 0.0))
    if backbone != "blip2-t5":  # but not to the first token under causal attention: it is the sink
        bias[torch.arange(len(ids)), mask.argmax(1)] = 0
    reference = {**inputs, **vanilla_positions(backbone, inputs)}
    reference["attention_mask"] = additive_mask(backbone, inputs, bias)
    expected = tiny.vanilla(backbone, attention)(**reference).logits
    assert_close(answers(out.logits, mask.bool()), answers(expected, mask.bool()))
    untouched = tiny.vanilla(backbone, attention)(**inputs).logits
    assert (answers(out.logits, mask.bool()) - answers(untouched, mask.bool())).abs().max() > 0.05


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_weight_0_masks_the_modality(backbone, attention, padding):
    inputs = tiny.prompts(backbone, "pairs", padding)
    weights = torch.eye(2)[torch.arange(len(inputs["input_ids"])) % 2]
    out = tiny.shared(backbone, attention)(**inputs, modality_weights=weights)
    assert torch.equal(out.modality_weights, weights)
    removed = torch.where(weights[:, :1] == 0, out.modality_ids == 1, out.modality_ids == 2)
    keep = inputs["attention_mask"].bool() & ~removed
    expected = masked_reference(backbone, attention, inputs, keep)
    assert_close(answers(out.logits, keep), answers(expected, keep))


@pytest.mark.parametrize("fusion", ["attention", "embedding"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_nearly_uniform_weights_change_nearly_nothing(backbone, fusion):
    """No jump between the backbone's own path and the weighed one, with a hole in the attention mask as well."""
    inputs = tiny.prompts(backbone, "mixed", "left")
    inputs["attention_mask"][0, 8:10] = 0
    keep = inputs["attention_mask"].bool()
    weights = torch.tensor([[0.5 + 1e-6, 0.5 - 1e-6]] * len(keep))
    out = tiny.shared(backbone, fusion=fusion)(**inputs, modality_weights=weights)
    assert not torch.equal(out.modality_weights, torch.full_like(weights, 0.5))
    assert_close(answers(out.logits, keep), answers(tiny.vanilla(backbone)(**inputs).logits, keep), 1e-4)


@pytest.mark.parametrize("fusion", ["attention", "embedding"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_modality_mask_false_is_weight_0(backbone, fusion):
    inputs = tiny.prompts(backbone, "pairs", "left")
    mask = torch.tensor([[False, True], [True, True], [True, False]])
    model = tiny.build(backbone, scheduler="entropy", fusion=fusion, stirred=True)
    out = model(**inputs, modality_mask=mask)
    weights = out.modality_weights
    assert torch.equal(weights[[0, 2]], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert (weights[1] > 0).all()
    assert not torch.equal(weights[1], torch.full((2,), 0.5))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert_close(out.logits, model(**inputs, modality_weights=weights).logits)
    said = model(**inputs, modality_mask=mask, modality_weights=torch.full((3, 2), 0.5))
    assert torch.equal(said.modality_weights, torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]))


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_given_modality_ids(backbone):
    inputs = tiny.prompts(backbone, "pairs", "left")
    model, weights = tiny.shared(backbone), tiny.uneven(3)
    inferred = model(**inputs, modality_weights=weights)
    same = model(**inputs, modality_weights=weights, modality_ids=inferred.modality_ids)
    assert torch.equal(same.logits, inferred.logits)

    question_neutral = inferred.modality_ids.clone()
    question_neutral[:, -2:] = 0
    out = model(**inputs, modality_weights=weights, modality_ids=question_neutral)
    assert torch.equal(out.modality_ids, question_neutral)
    assert (out.logits - inferred.logits).abs().max() > 1e-3

    # with the context at weight 0, what stays is the image, the question and the special tokens
    no_context = torch.tensor([[1.0, 0.0]] * 3)
    out = model(**inputs, modality_weights=no_context, modality_ids=question_neutral)
    keep = inputs["attention_mask"].bool() & (question_neutral != 2)
    expected = masked_reference(backbone, "sdpa", inputs, keep)
    assert_close(answers(out.logits, keep), answers(expected, keep))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_batch_equals_its_rows(backbone, attention, padding):
    inputs = tiny.prompts(backbone, "mixed", padding)
    count, mask = len(inputs["input_ids"]), inputs["attention_mask"].bool()
    inputs["modality_mask"] = torch.ones(count, 2, dtype=torch.bool)
    inputs["modality_mask"][2, 0] = False
    learned = tiny.shared(backbone, attention, scheduler="learned", stirred=True)
    for model, given in (
        (tiny.shared(backbone, attention), {**inputs, "modality_weights": tiny.uneven(count)}),
        (learned, inputs),
    ):
        out = model(**given)
        for index in range(count):
            alone = model(**tiny.row(given, index))
            mine = out.logits[index] if backbone == "blip2-t5" else out.logits[index, mask[index]]
            assert_close(mine, alone.logits[0], 3e-5)
            assert_close(out.modality_weights[index], alone.modality_weights[0])
            if model is learned:
                for name, value in alone.modality_signals.items():
                    torch.testing.assert_close(out.modality_signals[name][index], value[0], rtol=1e-4, atol=1e-5)
    weights = out.modality_weights
    assert torch.equal(weights[1], torch.tensor([0.0, 1.0])), "a row without an image"
    assert torch.equal(weights[3], torch.tensor([1.0, 0.0])), "a row without text"
    assert torch.equal(weights[2], torch.tensor([0.0, 1.0])), "a row whose image is declared missing"
    both = weights[(weights > 0).all(1)]
    assert both.sub(0.5).abs().min() > 1e-3, "a stirred scheduler weighs unevenly"


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_kernels_agree(backbone, padding):
    inputs = tiny.prompts(backbone, "mixed", padding)
    keep, weights = inputs["attention_mask"].bool(), tiny.uneven(len(inputs["input_ids"]))
    logits = [tiny.shared(backbone, attention)(**inputs, modality_weights=weights).logits for attention in ATTENTION]
    assert_close(answers(logits[0], keep), answers(logits[1], keep), 3e-5)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("backbone", tiny.DECODER_ONLY)
def test_flex_attention_agrees(backbone, padding):
    inputs = tiny.prompts(backbone, "pairs", padding)
    flex, sdpa = tiny.shared(backbone, "flex_attention"), tiny.shared(backbone, "sdpa")
    removing = torch.eye(2)[torch.arange(len(inputs["input_ids"])) % 2]
    # uncompiled, the kernel is the same arithmetic and needs no compiler
    with torch.compiler.set_stance("force_eager"):
        uniform = flex(**inputs).logits
        assert torch.equal(uniform, tiny.vanilla(backbone, "flex_attention")(**inputs).logits)
        for weights in (tiny.uneven(3), removing):
            out, expected = (model(**inputs, modality_weights=weights) for model in (flex, sdpa))
            removed = (out.modality_weights[:, 0] == 0)[:, None] & (out.modality_ids == 1)
            removed |= (out.modality_weights[:, 1] == 0)[:, None] & (out.modality_ids == 2)
            keep = inputs["attention_mask"].bool() & ~removed
            assert_close(out.logits[keep], expected.logits[keep], 3e-5)
            assert (out.logits - uniform).abs().max() > 0.05


# ---- cached decoding by hand


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backbone", tiny.LLAVA_SHAPED)
def test_cached_equals_uncached(backbone, attention, padding, start):
    inputs = starting_with(start, tiny.prompts(backbone, "mixed", padding))
    model = tiny.shared(backbone, attention, scheduler="learned", stirred=True)
    prefill = model(**inputs, **{CACHE: DynamicCache(config=model.config.get_text_config())})
    carried = {"modality_weights": prefill.modality_weights, "modality_ids": prefill.modality_ids}
    assert prefill.modality_weights.sub(0.5).abs().min() > 1e-3
    cache, logits = prefill[CACHE], [prefill.logits[:, -1:]]
    whole = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for step in torch.arange(10, 10 + 3 * len(inputs["input_ids"])).view(3, -1, 1):
        whole["input_ids"] = torch.cat([whole["input_ids"], step], 1)
        whole["attention_mask"] = F.pad(whole["attention_mask"], (0, 1), value=1)
        out = model(input_ids=step, attention_mask=whole["attention_mask"], **{CACHE: cache}, **carried)
        cache = out[CACHE]
        logits.append(out.logits)
    carried["modality_ids"] = F.pad(carried["modality_ids"], (0, 3))
    uncached = model(**whole, pixel_values=inputs["pixel_values"], use_cache=False, **carried)
    ends = inputs["attention_mask"][:, -1] == 1  # elsewhere the prompt's last position is padding
    assert_close(torch.cat(logits[1:], 1), uncached.logits[:, -3:], 3e-5)
    assert_close(logits[0][ends], uncached.logits[:, -4:-3][ends], 3e-5)


@pytest.mark.parametrize("scheduler", ["uniform", "learned"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("backbone", ["blip2-opt", "blip2-llama"])
def test_cached_equals_uncached_blip2(backbone, padding, scheduler):
    """`Blip2ForConditionalGeneration.forward` hands the cache on to its language model."""
    for attention, start in itertools.product(ATTENTION, STARTS):
        inputs = starting_with(start, tiny.prompts(backbone, "mixed", padding))
        model = tiny.shared(backbone, attention, scheduler=scheduler, stirred=True)
        prefill = model(**inputs, use_cache=True)
        carried = {"modality_weights": prefill.modality_weights, "modality_ids": prefill.modality_ids}
        cache, logits = prefill.language_model_outputs[CACHE], []
        whole = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for step in torch.arange(10, 10 + 3 * len(inputs["input_ids"])).view(3, -1, 1):
            whole["input_ids"] = torch.cat([whole["input_ids"], step], 1)
            whole["attention_mask"] = F.pad(whole["attention_mask"], (0, 1), value=1)
            out = model(input_ids=step, attention_mask=whole["attention_mask"], **{CACHE: cache}, **carried)
            logits.append(out.logits)
        carried["modality_ids"] = F.pad(carried["modality_ids"], (0, 3))
        uncached = model(**whole, pixel_values=inputs["pixel_values"], use_cache=False, **carried)
        assert_close(torch.cat(logits, 1), uncached.logits[:, -3:], 3e-5)


def test_a_cache_of_chunks_equals_one_prefill():
    """A second prompt chunk after the first sees the first one's bias as well."""
    inputs = tiny.prompts("llava-llama", "pairs", "none")
    model, weights = tiny.shared("llava-llama"), tiny.uneven(3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(**inputs, modality_weights=weights)
    first = model(
        input_ids=ids[:, :8],
        attention_mask=mask[:, :8],
        pixel_values=inputs["pixel_values"],
        modality_weights=weights,
        use_cache=True,
    )
    second = model(
        input_ids=ids[:, 8:],
        attention_mask=mask,
        **{CACHE: first[CACHE]},
        modality_weights=weights,
        modality_ids=whole.modality_ids,
    )
    assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, 3e-5)


# ---- fusion by embedding


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_embedding_fusion_scales_the_embeddings(backbone):
    inputs = tiny.prompts(backbone, "pairs", "left")
    model = tiny.shared(backbone, fusion="embedding", scheduler="uniform")
    reference = tiny.vanilla(backbone)
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)

    weights = tiny.uneven(3)
    out = model(**inputs, modality_weights=weights)
    assert torch.equal(out.modality_weights, weights)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    features = torch.cat(list(reference.get_image_features(pixels).pooler_output))
    embeddings = reference.get_input_embeddings()(ids)
    embeddings = embeddings.masked_scatter((ids == tiny.IMAGE)[..., None], features)
    scale = F.pad(2 * weights, (1, 0), value=1.0).gather(1, out.modality_ids)
    stack = reference if backbone in tiny.LLAVA_SHAPED else reference.language_model
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "pixel_values")}
    expected = stack(inputs_embeds=embeddings * scale[..., None], **rest).logits
    keep = inputs["attention_mask"].bool()
    assert_close(answers(out.logits, keep), answers(expected, keep))
    assert (answers(out.logits, keep) - answers(model(**inputs).logits, keep)).abs().max() > 1e-3


# ---- retrieval


def retrieval_batch(padding="right", placeholders=True):
    inputs = tiny.prompts("retrieval", padding=padding)
    if not placeholders:
        inputs |= {name: inputs[name][:, tiny.IMAGE_TOKENS :] for name in ("input_ids", "attention_mask")}
    return inputs


def retrieval_models(placeholders, **dms):
    if placeholders:
        return tiny.shared("retrieval", **dms), tiny.vanilla("retrieval")
    model = copy.deepcopy(tiny.shared("retrieval", **dms))
    model.config.image_token_index = None
    reference = copy.deepcopy(tiny.vanilla("retrieval"))
    reference.config.image_token_index = None
    return model, reference


@pytest.mark.parametrize("matching", [True, False], ids=["matching", "contrastive"])
@pytest.mark.parametrize("placeholders", [True, False], ids=["placeholders", "no-placeholders"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_retrieval_is_the_vanilla_class(padding, placeholders, matching):
    inputs = retrieval_batch(padding, placeholders)
    for dms in ({"scheduler": "uniform"}, {"scheduler": "rule"}, {"scheduler": "learned"}):
        model, reference = retrieval_models(placeholders, **dms)
        out = model(**inputs, use_image_text_matching_head=matching)
        expected = reference(**inputs, use_image_text_matching_head=matching)
        for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
            assert torch.equal(out[name], expected[name]), (dms, name)
        assert torch.equal(out.modality_weights, torch.full((3, 2), 0.5))


@pytest.mark.parametrize("placeholders", [True, False], ids=["placeholders", "no-placeholders"])
def test_retrieval_matching_by_weights(placeholders):
    inputs = retrieval_batch("right", placeholders)
    model, reference = retrieval_models(placeholders)
    asked = {"use_image_text_matching_head": True}
    vanilla = reference(**inputs, **asked).logits_per_image
    uneven = model(**inputs, **asked, modality_weights=tiny.uneven(3)).logits_per_image
    assert (uneven - vanilla).abs().max() > 1e-3
    for index in range(3):
        one = {name: value[index : index + 1] for name, value in inputs.items()}
        alone = model(**one, **asked, modality_weights=tiny.uneven(3)[index : index + 1]).logits_per_image
        assert_close(uneven[index], alone[0])


def test_retrieval_matching_spares_no_sink(monkeypatch):
    """The Q-Former is not causal: the first query is weighed like the others."""
    biases, fold = [], modeling_dms_blip_2.fold_key_bias
    monkeypatch.setattr(
        modeling_dms_blip_2, "fold_key_bias", lambda keep, bias, dtype: biases.append(bias) or fold(keep, bias, dtype)
    )
    model, weights = retrieval_models(True)[0], tiny.uneven(3)
    out = model(**retrieval_batch(), use_image_text_matching_head=True, modality_weights=weights)
    assert torch.equal(biases[0], key_bias(weights, out.modality_ids))


def test_retrieval_weight_0_masks_the_text():
    inputs = retrieval_batch()
    model, reference = retrieval_models(True)
    asked = {"use_image_text_matching_head": True}
    out = model(**inputs, **asked, modality_weights=torch.tensor([[1.0, 0.0]] * 3))
    masked = {**inputs, "attention_mask": (out.modality_ids == 1).long()}
    assert_close(out.logits_per_image, reference(**masked, **asked).logits_per_image)
    # without vision no query attends to a query, but each still reads the image by cross-attention
    out = model(**inputs, **asked, modality_weights=torch.tensor([[0.0, 1.0]] * 3))
    masked = {**inputs, "attention_mask": inputs["attention_mask"] * (out.modality_ids != 1)}
    assert_close(out.logits_per_image, reference(**masked, **asked).logits_per_image)


def test_retrieval_contrastive_draws_the_doubtful_towards_0():
    inputs = retrieval_batch()
    model, reference = retrieval_models(True)
    vanilla = reference(**inputs).logits_per_image
    weights = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.8, 0.2]])
    out = model(**inputs, modality_weights=weights)
    trust = (2 * weights).clamp_max(1)
    assert_close(out.logits_per_image, vanilla * trust[:, :1] * trust[:, 1])
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)


@pytest.mark.parametrize("images", [1, 3])
def test_retrieval_one_against_many(images):
    inputs = retrieval_batch()
    model, reference = retrieval_models(True, scheduler="rule")
    if images == 1:
        inputs["pixel_values"] = inputs["pixel_values"][:1]
    else:
        inputs |= {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    expected = reference(**inputs)
    out = model(**inputs)
    assert out.logits_per_image.shape == expected.logits_per_image.shape
    assert torch.equal(out.logits_per_image, expected.logits_per_image)
    assert torch.equal(out.modality_weights, torch.full((3, 2), 0.5))
    if images > 1:
        with pytest.raises(ValueError, match="pairs"):
            model(**inputs, use_image_text_matching_head=True)


@pytest.mark.parametrize("placeholders", [True, False], ids=["placeholders", "no-placeholders"])
def test_retrieval_matches_one_image_with_many_texts(placeholders):
    inputs = retrieval_batch("right", placeholders)
    model, reference = retrieval_models(placeholders, scheduler="rule")
    asked = {"use_image_text_matching_head": True}
    one = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
    repeated = {**inputs, "pixel_values": inputs["pixel_values"][:1].expand(3, -1, -1, -1)}
    assert_close(model(**one, **asked).logits_per_image, reference(**repeated, **asked).logits_per_image)
    weights = tiny.uneven(3)
    expected = model(**repeated, **asked, modality_weights=weights).logits_per_image
    assert_close(model(**one, **asked, modality_weights=weights).logits_per_image, expected)


@pytest.mark.parametrize("placeholders", [True, False], ids=["placeholders", "no-placeholders"])
def test_retrieval_weights_without_matching(placeholders):
    inputs = retrieval_batch("right", placeholders)
    for dms in ({"scheduler": "learned", "stirred": True}, {"scheduler": "entropy"}, {"scheduler": "uniform"}):
        model = retrieval_models(placeholders, **dms)[0]
        for pixels in (inputs["pixel_values"], inputs["pixel_values"][:1]):
            given = {**inputs, "pixel_values": pixels}
            out = model(**given)
            weights, signals = model.get_modality_weights(**given)
            assert torch.equal(weights, out.modality_weights)
            assert (signals is None) == (out.modality_signals is None)
    with pytest.raises(ValueError, match="pixel_values"):
        model.get_modality_weights(inputs["input_ids"])


def test_retrieval_weights_of_a_batch_equal_its_rows():
    inputs = retrieval_batch()
    model = tiny.shared("retrieval", scheduler="learned", stirred=True)
    out = model(**inputs)
    assert out.modality_weights.sub(0.5).abs().min() > 1e-3
    for index in range(3):
        keep = inputs["attention_mask"][index].bool()
        one = {name: inputs[name][index : index + 1, keep] for name in ("input_ids", "attention_mask")}
        alone = model(**one, pixel_values=inputs["pixel_values"][index : index + 1])
        assert_close(out.modality_weights[index], alone.modality_weights[0])
        assert_close(out.logits_per_image[index, index], alone.logits_per_image[0, 0])
