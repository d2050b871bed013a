"""Generation: the vanilla answer where nothing is weighed, the uncached argmax where something is, weights once."""

import contextlib
import copy
import logging
import threading

import pytest
import torch
from torch.nn import functional as F
from transformers import ContinuousBatchingConfig, LogitsProcessorList, StaticCache, SuppressTokensLogitsProcessor

from modeling_dms._compat import CACHE, cache_of
from tests import tiny


NEW = 4
BANNED = [tiny.EOS, tiny.IMAGE]
MODES = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "sample": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3},
    "beam-static": {"num_beams": 3, "cache_implementation": "static"},
    "beam-sequences": {"num_beams": 3, "num_return_sequences": 2},
    "no-cache": {"use_cache": False},
}
CACHED = tuple(mode for mode in MODES if mode != "no-cache")


def generate(model, inputs, mode="greedy", **kwargs):
    """`NEW` tokens, none of them the end or an image placeholder, from one random state."""
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "suppress_tokens": BANNED, **MODES[mode]}
    return model.generate(**inputs, **options, **kwargs)


@contextlib.contextmanager
def counted(module):
    """Counts the calls of a module."""
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_static_weights_generate_as_the_vanilla_class(backbone, padding):
    vanilla = tiny.vanilla(backbone)
    for kind in ("pairs", "mixed"):
        inputs = tiny.prompts(backbone, kind, padding)
        for mode in CACHED if (kind, padding) == ("pairs", "left") else ("greedy", "beam"):
            expected = generate(vanilla, inputs, mode)
            for scheduler in ("uniform", "rule"):
                assert torch.equal(generate(tiny.shared(backbone, scheduler=scheduler), inputs, mode), expected), mode
    weights = torch.full((3, 2), 0.5)
    inputs = tiny.prompts(backbone, "pairs", padding)
    given = generate(tiny.shared(backbone, scheduler="entropy"), inputs, modality_weights=weights)
    assert torch.equal(given, generate(vanilla, inputs))


@torch.no_grad()
def uncached(model, inputs, weights, choose):
    """Tokens chosen one by one, each from a forward pass over the whole sequence."""
    start = model(**inputs, modality_weights=weights)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    pixels = inputs["pixel_values"]
    if "decoder_input_ids" in inputs:
        tokens = torch.full((len(weights), 1), tiny.PAD)
        for _ in range(NEW):
            out = model(**prompt, pixel_values=pixels, modality_weights=weights, decoder_input_ids=tokens)
            tokens = torch.cat([tokens, choose(out.logits[:, -1])], 1)
        return tokens
    ids = start.modality_ids
    for _ in range(NEW):
        out = model(**prompt, pixel_values=pixels, modality_weights=weights, modality_ids=ids)
        prompt["input_ids"] = torch.cat([prompt["input_ids"], choose(out.logits[:, -1])], 1)
        prompt["attention_mask"] = F.pad(prompt["attention_mask"], (0, 1), value=1)
        ids = F.pad(ids, (0, 1))
    return prompt["input_ids"]


def allowed(logits):
    return logits.index_fill(1, torch.tensor(BANNED), -torch.inf)


def argmax(logits):
    return allowed(logits).argmax(1, keepdim=True)


# a word in front makes the attention sink the text's own
@pytest.mark.parametrize(("attention", "start"), [("sdpa", tiny.BOS), ("eager", 5)])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_weighed_tokens_are_those_of_an_uncached_loop(backbone, attention, start):
    model = tiny.shared(backbone, attention, scheduler="learned", stirred=True)
    inputs = tiny.prompts(backbone, "mixed", "left")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.BOS, start)
    weights = tiny.uneven(len(inputs["input_ids"]))
    expected = uncached(model, inputs, weights, argmax)
    for mode in ("greedy", "static"):
        tokens = generate(model, inputs, mode, modality_weights=weights)
        assert torch.equal(tokens, expected), mode
    swapped = generate(model, inputs, modality_weights=weights.flip(1))
    assert not torch.equal(swapped, expected), "the weights must matter for this test to say anything"

    torch.manual_seed(0)
    sampled = uncached(model, inputs, weights, lambda logits: allowed(logits).softmax(1).multinomial(1))
    assert torch.equal(generate(model, inputs, "sample", modality_weights=weights), sampled)

    own = model(**inputs).modality_weights
    assert own[(own > 0).all(1)].sub(0.5).abs().min() > 1e-3
    expected = uncached(model, inputs, own, argmax)
    assert torch.equal(generate(model, inputs), expected)


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_generation_without_a_cache(backbone):
    inputs = tiny.prompts(backbone, "pairs", "left")
    expected = generate(tiny.vanilla(backbone), inputs, "no-cache")
    assert torch.equal(generate(tiny.shared(backbone, scheduler="uniform"), inputs, "no-cache"), expected)
    assert torch.equal(generate(tiny.shared(backbone, scheduler="rule"), inputs, "no-cache"), expected)
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    tokens = generate(model, inputs, "no-cache", modality_weights=tiny.uneven(3))
    assert torch.equal(tokens, uncached(model, inputs, tiny.uneven(3), argmax))


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_weighed_beams_score_as_an_uncached_pass(backbone):
    model = tiny.shared(backbone, scheduler="entropy")
    inputs = tiny.prompts(backbone, "mixed", "left")
    weights = tiny.uneven(len(inputs["input_ids"]))
    asked = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    for mode in ("beam", "beam-static"):
        out = generate(model, inputs, mode, modality_weights=weights, **asked)
        sequences = out.sequences
        given = {**inputs, "modality_weights": weights}
        if backbone == "blip2-t5":
            given["decoder_input_ids"] = sequences[:, :-1]
        else:
            given["input_ids"] = sequences[:, :-1]
            given["attention_mask"] = F.pad(inputs["attention_mask"], (0, NEW - 1), value=1)
            prompt_ids = model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
            given["modality_ids"] = F.pad(prompt_ids, (0, NEW - 1))
        with torch.no_grad():
            expected = model(**given)
        assert torch.equal(out.modality_weights, expected.modality_weights)
        logits = expected.logits
        log_p = logits[:, -NEW:].log_softmax(-1)
        scores = log_p.gather(2, sequences[:, -NEW:, None]).sum((1, 2))
        torch.testing.assert_close(out.sequences_scores, scores, rtol=0, atol=2e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_weights_are_computed_once_and_returned(backbone, mode):
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    inputs = tiny.prompts(backbone, "pairs", "left")
    with torch.no_grad():
        expected = model(**inputs)
    with counted(model.dms) as calls:
        out = generate(model, inputs, mode, return_dict_in_generate=True)
    assert len(calls) == 1
    assert out.modality_weights.shape == (3, 2)
    assert torch.equal(out.modality_weights, expected.modality_weights)
    assert torch.equal(out.modality_signals.confidence, expected.modality_signals.confidence)
    assert torch.equal(out.sequences, generate(model, inputs, mode))
    if mode == "beam-sequences":
        assert len(out.sequences) == 6


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_generate_takes_the_arguments_of_forward(backbone):
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    inputs = tiny.prompts(backbone, "pairs", "left")
    inputs.pop("decoder_input_ids", None)
    mask = torch.tensor([[False, True], [True, True], [True, False]])
    out = generate(model, inputs, modality_mask=mask, return_dict_in_generate=True)
    assert torch.equal(out.modality_weights > 0, mask)
    with torch.no_grad():
        ids = model(**tiny.prompts(backbone, "pairs", "left")).modality_ids
    ids[:, -3:] = 0
    with torch.no_grad():
        expected = model(**tiny.prompts(backbone, "pairs", "left"), modality_ids=ids).modality_weights
    out = generate(model, inputs, modality_ids=ids, return_dict_in_generate=True)
    assert torch.equal(out.modality_weights, expected)


@pytest.mark.parametrize("backbone", ["blip2-opt", "blip2-t5"])
def test_captions_without_a_prompt(backbone):
    pixels = {"pixel_values": tiny.prompts(backbone)["pixel_values"]}
    expected = generate(tiny.vanilla(backbone), pixels)
    assert torch.equal(generate(tiny.shared(backbone), pixels), expected)
    out = generate(tiny.shared(backbone, scheduler="entropy"), pixels, return_dict_in_generate=True)
    assert torch.equal(out.modality_weights, torch.tensor([[1.0, 0.0]] * 3))


@pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3", "blip2-opt"])
def test_prompts_without_any_image(backbone):
    inputs = tiny.batch([(6,), (4,)], "left")
    assert "pixel_values" not in inputs
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    out = generate(model, inputs, return_dict_in_generate=True)
    assert torch.equal(out.modality_weights, torch.tensor([[0.0, 1.0]] * 2))
    text = tiny.vanilla(backbone) if backbone in tiny.LLAVA_SHAPED else tiny.vanilla(backbone).language_model
    assert torch.equal(out.sequences, generate(text, inputs))


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_padding_on_the_right_is_warned_of_once(backbone, caplog):
    logging.Logger.warning_once.cache_clear()
    model = tiny.shared(backbone)

    def said():
        return [record.getMessage() for record in caplog.records if record.name.startswith("modeling_dms")]

    for inputs in (tiny.prompts(backbone, "mixed", "left"), tiny.prompts(backbone), tiny.batch([tiny.SHORT], "right")):
        generate(model, inputs)
    assert not said()
    for seed in (1, 2):
        generate(model, tiny.prompts(backbone, "mixed", "right", seed=seed))
    if backbone == "blip2-t5":  # an encoder reads padding wherever it stands
        assert not said()
    else:
        (warning,) = said()
        assert "padding_side = 'left'" in warning


@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_embedding_fusion_generates_by_its_weights(backbone):
    model = tiny.shared(backbone, fusion="embedding", scheduler="entropy")
    inputs, weights = tiny.prompts(backbone, "pairs", "left"), tiny.uneven(3)
    expected = uncached(model, inputs, weights, argmax)
    asked = {"return_dict_in_generate": True, "output_logits": True}
    out = generate(model, inputs, modality_weights=weights, **asked)
    assert torch.equal(out.sequences, expected)
    uniform = generate(model, inputs, modality_weights=torch.full((3, 2), 0.5), **asked)
    assert (uniform.logits[0] - out.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("backbone", tiny.FAMILIES)
def test_threads_on_one_model_get_their_own_weights(backbone, call):
    model = tiny.shared(backbone, scheduler="learned", stirred=True)
    batches = [tiny.prompts(backbone, "pairs", "left", seed=seed) for seed in (1, 2, 3)]

    def answer(inputs):
        if call == "forward":
            with torch.no_grad():
                return model(**inputs)
        return generate(model, inputs, return_dict_in_generate=True, output_logits=True)

    def logits(out):
        return out.logits if call == "forward" else torch.stack(out.logits)

    alone = [answer(inputs) for inputs in batches]
    assert not torch.equal(alone[0].modality_weights, alone[1].modality_weights)
    assert (logits(alone[0]) - logits(alone[1])).abs().max() > 1e-2
    results: list[list] = [[] for _ in batches]
    barrier = threading.Barrier(len(batches))

    def run(index):
        for _ in range(4):
            barrier.wait()
            results[index].append(answer(batches[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, outputs in zip(alone, results, strict=True):
        assert len(outputs) == 4, "a thread failed"
        for out in outputs:
            assert torch.equal(out.modality_weights, expected.modality_weights)
            torch.testing.assert_close(logits(out), logits(expected), rtol=0, atol=1e-4)
            for name, signal in expected.modality_signals.items():
                assert torch.equal(out.modality_signals[name], signal), name
            if call == "generate":
                assert torch.equal(out.sequences, expected.sequences)


@torch.no_grad()
def test_continuous_batching_answers_as_the_vanilla_class(monkeypatch):
    """Several prompts stand in one row there: nothing is observed, and no weights can steer it."""
    warned = []
    monkeypatch.setattr("modeling_dms.steered_mixin.logger.warning_once", warned.append)
    prompts = [[tiny.BOS, 5, 7, 9], [tiny.BOS, 8, 9]]
    # the default takes most of the memory
    small = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)}
    model, vanilla = tiny.build("llava-llama", scheduler="entropy"), copy.deepcopy(tiny.vanilla("llava-llama"))
    found = [m.generate_batch(inputs=prompts, max_new_tokens=3, **small) for m in (model, vanilla)]
    answers = [[out.generated_tokens for out in outputs.values()] for outputs in found]
    assert answers[0] == answers[1]
    assert all(answers[0])
    assert any("continuous batching" in warning for warning in warned)
    with pytest.raises(ValueError, match="continuous batching"):
        model(input_ids=torch.tensor([prompts[0]]), modality_weights=torch.tensor([[0.1, 0.9]]), **{CACHE: object()})


@torch.no_grad()
def test_a_cache_that_is_used_again_forgets_the_weights_of_its_old_prompt():
    model = tiny.shared("llava-llama", scheduler="learned", stirred=True)
    first = tiny.prompts("llava-llama", "pairs")
    second = tiny.noisy(first)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    model(**first, **{CACHE: cache})
    cache.reset()
    again, expected = model(**second, **{CACHE: cache}), model(**second)
    assert (expected.modality_weights - model(**first).modality_weights).abs().max() > 1e-3
    torch.testing.assert_close(again.modality_weights, expected.modality_weights, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_is_used_again_forgets_them_where_nothing_can_be_observed():
    model = tiny.shared("llava-llama", scheduler="learned", stirred=True)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    model(**tiny.prompts("llava-llama", "pairs"), **{CACHE: cache})
    cache.reset()
    embeddings, step = torch.randn(3, 6, 32), torch.full((3, 1), 10)
    found = []
    for prompt_cache in (cache, StaticCache(config=model.config.get_text_config(), max_cache_len=64)):
        model(inputs_embeds=embeddings, **{CACHE: prompt_cache})
        out = model(input_ids=step, **{CACHE: prompt_cache})
        assert out.modality_weights is None
        found.append(out.logits)
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@torch.no_grad()
def test_images_behind_a_cached_prompt_are_told_to_be_unobserved(monkeypatch):
    warned = []
    monkeypatch.setattr("modeling_dms.steered_mixin.logger.warning_once", warned.append)
    model = tiny.build("llava-llama", false_alarm_rate=0.05)
    model.calibrate(tiny.clean_samples(), show_progress=False)
    whole = tiny.row(tiny.prompts("llava-llama", "pairs"), 0)
    start = int((whole["input_ids"][0] == tiny.IMAGE).nonzero()[0])
    prefix = {name: whole[name][:, :start] for name in ("input_ids", "attention_mask")}
    cache = model(**prefix, use_cache=True)[CACHE]
    out = model.generate(**whole, **{CACHE: cache}, max_new_tokens=2, return_dict_in_generate=True)
    assert any("images behind a cached prompt" in warning for warning in warned)
    assert out.reliability is None
    vanilla = copy.deepcopy(tiny.vanilla_of(model))
    cache = vanilla(**prefix, use_cache=True)[CACHE]
    assert torch.equal(out.sequences, vanilla.generate(**whole, **{CACHE: cache}, max_new_tokens=2))


@pytest.mark.parametrize("backbone", ["blip2-opt", "llava-llama"])
@torch.no_grad()
def test_what_generate_returned_goes_on_with_its_weights(backbone):
    model, inputs = tiny.shared(backbone), tiny.prompts(backbone, "pairs")
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    asked = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **asked, modality_weights=tiny.uneven(3))
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    on = model(input_ids=torch.full((3, 1), 10), attention_mask=mask, **{CACHE: cache_of(out)})
    assert torch.equal(on.modality_weights, tiny.uneven(3))
    ids = model.infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
    longer = {**inputs, "input_ids": F.pad(inputs["input_ids"], (0, 1), value=10), "attention_mask": mask}
    expected = model(**longer, modality_ids=F.pad(ids, (0, 1)), modality_weights=tiny.uneven(3))
    torch.testing.assert_close(on.logits[:, -1], expected.logits[:, -1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_guidance_of_blip2_is_refused_where_weights_are_not_uniform():
    model, inputs = tiny.shared("blip2-opt"), tiny.prompts("blip2-opt", "pairs")
    guided = {"guidance_scale": 2.0, "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match="guidance"):
        model.generate(**inputs, **guided, modality_weights=tiny.uneven(3))
    config = copy.deepcopy(model.language_model.generation_config)
    config.guidance_scale = 2.0
    with pytest.raises(ValueError, match="guidance"):
        model.generate(**inputs, generation_config=config, modality_weights=tiny.uneven(3), max_new_tokens=3)
    expected = tiny.vanilla("blip2-opt").generate(**inputs, **guided)
    assert torch.equal(model.generate(**inputs, **guided), expected)


@torch.no_grad()
def test_candidates_that_a_configuration_asks_for_are_not_taken_for_the_answer():
    model = tiny.build("llava-llama", false_alarm_rate=0.05)
    model.calibrate(tiny.clean_samples(), show_progress=False)
    row = tiny.row(tiny.prompts("llava-llama", "pairs"), 0)
    # an n-gram that comes again, for which there are candidates
    text = torch.tensor([[11, 12, 13, 14, 11, 12]])
    row["input_ids"] = torch.cat([row["input_ids"], text], 1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    config = copy.deepcopy(model.generation_config)
    config.prompt_lookup_num_tokens = 2
    assert model.generate(**row, **asked, generation_config=config).reliability is None
    assert model.generate(**row, **asked, prompt_lookup_num_tokens=2).reliability is None
    assert model.generate(**row, **asked).reliability is not None


@torch.no_grad()
def test_generate_takes_its_arguments_by_place():
    model, inputs = tiny.shared("llava-llama"), tiny.prompts("llava-llama", "pairs")
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = 3
    never = LogitsProcessorList([SuppressTokensLogitsProcessor([*range(4, 40)])])
    ids, rest = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
    expected = tiny.vanilla("llava-llama").generate(ids, config, never, **rest)
    assert torch.equal(model.generate(ids, config, never, **rest), expected)


@torch.no_grad()
def test_weights_of_the_caller_win_over_those_that_a_cache_carries():
    model, inputs = tiny.shared("llava-llama", scheduler="learned", stirred=True), tiny.prompts("llava-llama", "pairs")
    step, logits = torch.full((3, 1), 10), []
    for named in (True, False):
        out = model(**inputs, use_cache=True)
        ids = {"modality_ids": out.modality_ids} if named else {}
        on = model(input_ids=step, **{CACHE: out[CACHE]}, modality_weights=tiny.uneven(3), **ids)
        assert torch.equal(on.modality_weights, tiny.uneven(3))
        logits.append(on.logits)
    assert torch.equal(*logits)


# BLIP-2 takes no prompt in chunks, vanilla or not
@pytest.mark.parametrize("backbone", ["llava-llama", "internvl-qwen3"])
@torch.no_grad()
def test_embeddings_are_scaled_in_every_chunk_of_a_prompt(backbone):
    model, inputs = tiny.shared(backbone, fusion="embedding"), tiny.prompts(backbone, "pairs", "left")
    asked = {"return_dict_in_generate": True, "output_logits": True}
    vanilla = tiny.vanilla(backbone)
    plain = [generate(vanilla, inputs, prefill_chunk_size=size, **asked).logits[0] for size in (None, 5)]
    if (plain[0] - plain[1]).abs().max() > 1e-3:  # transformers 5.20, for one
        pytest.skip("the vanilla class leaves the image out of a prompt in chunks")
    asked["modality_weights"] = tiny.uneven(3)
    whole, chunks = generate(model, inputs, **asked), generate(model, inputs, prefill_chunk_size=5, **asked)
    for one, other in zip(whole.logits, chunks.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    uniform = generate(model, inputs, **asked | {"modality_weights": torch.full((3, 2), 0.5)})
    assert (whole.logits[0] - uniform.logits[0]).abs().max() > 1e-3


def test_an_argument_is_given_once():
    """As Python has it, though both take what the vanilla class takes, whatever that is."""
    model, inputs = tiny.shared("llava-llama"), tiny.prompts("llava-llama")
    ids = inputs["input_ids"]
    with pytest.raises(TypeError, match="argument 'input_ids' is given twice, by place and by name"):
        model(ids, **inputs)
    config = model.generation_config
    with pytest.raises(TypeError, match="argument 'generation_config' is given twice"):
        model.generate(ids, config, generation_config=config)
    with pytest.raises(TypeError, match=r"at most \d+ arguments can be given by place, got 60"):
        model(*[None] * 60)
