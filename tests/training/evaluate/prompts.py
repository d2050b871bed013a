"""Prompts as a collator makes them, and what is found of them without cache, padding or batch."""

import torch

from tests import tiny


CONTINUATIONS = [[7, 8, 9], [11], [7, 12], [13, 14, 15, 16]]


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to rounding, measured against the largest value."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def prompt_of(backbone, kind="mixed", padding="left"):
    """A batch as a collator makes it, with rows that lack image or text."""
    inputs = tiny.prompts(backbone, kind, padding)
    inputs.pop("decoder_input_ids", None)
    ids = tiny.shared(backbone).infer_modality_ids(inputs["input_ids"], inputs["attention_mask"])
    return {**inputs, "modality_ids": ids, "sample_ids": [f"sample-{i}" for i in range(len(ids))]}


def row_of(prompt, index):
    """One sample without its padding."""
    tensors = {name: value for name, value in prompt.items() if name != "sample_ids"}
    return {**tiny.row(tensors, index), "sample_ids": [prompt["sample_ids"][index]]}


def rows_of(prompt):
    return [row_of(prompt, index) for index in range(len(prompt["input_ids"]))]


def steered(backbone):
    """A model whose own weights are not uniform."""
    return tiny.shared(backbone, scheduler="learned", stirred=True)


def whole(model, prompt, tokens, weights):
    """Logits (1, N + 1, K) behind a single prompt and each of the tokens, in one pass without a cache."""
    inputs = {name: value for name, value in prompt.items() if name != "sample_ids"}
    if model.config.get_text_config().is_encoder_decoder:
        return model(**inputs, modality_weights=weights, decoder_input_ids=torch.tensor([[tiny.PAD, *tokens]])).logits
    longer = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "modality_ids": [0] * len(tokens)}
    for name, more in longer.items():
        inputs[name] = torch.cat([inputs[name], torch.tensor([more], dtype=torch.long)], 1)
    return model(**inputs, modality_weights=weights).logits[:, -len(tokens) - 1 :]


def plain_log_likelihood(logits, tokens):
    return sum(line.log_softmax(-1)[token] for line, token in zip(logits[0], tokens, strict=False))
