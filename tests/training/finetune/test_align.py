"""The stage `align`: image tokens become the words of their image's text."""

import pytest
import torch

from modeling_dms.training.data import PromptCollator, load_samples
from modeling_dms.training.finetune.align import AlignmentTrainer, alignment_loss
from modeling_dms.training.finetune.stages import prepare
from modeling_dms.training.finetune.trainer import DMSTrainingArguments
from modeling_dms.training.models.loading import load


def test_image_tokens_stand_for_words_in_turn():
    embeddings = 3 * torch.eye(6)
    words = torch.tensor([[0, 1, 2], [3, 4, 5]])
    tokens = embeddings[words][:, [0, 1, 2, 0, 1]]
    best = alignment_loss(tokens, words, embeddings)
    assert best < 1e-6
    for place, other in ((0, 1), (3, 1), (4, 2)):
        wrong = tokens.clone()
        wrong[1, place] = embeddings[other]
        # one of ten tokens says another word: 20 nats of cross-entropy, and two of six dimensions off by 3
        expected = 2.0 + 18 / 60 / float(embeddings.var())
        torch.testing.assert_close(float(alignment_loss(wrong, words, embeddings)), expected, rtol=1e-4, atol=1e-4)


def test_a_longer_token_costs_its_length_alone():
    embeddings, words = torch.eye(4), torch.tensor([[0, 1]])
    tokens = embeddings[words]
    longer = alignment_loss(2 * tokens, words, embeddings) - alignment_loss(tokens, words, embeddings)
    torch.testing.assert_close(longer, 0.25 / embeddings.var())


def trainer_of(folder, backbone, samples, steps):
    model, processor = load(backbone, {"scheduler": "uniform"})
    args = DMSTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    collator = PromptCollator(processor, with_labels=True)
    return AlignmentTrainer(prepare(model, "align"), args, collator, samples)


@pytest.mark.parametrize("backbone", ["demo-llava", "demo-blip2"])
def test_training_brings_image_tokens_to_their_words(tmp_path, backbone):
    samples = load_samples("easy-vqa", "train", "caption", limit=32)
    trainer = trainer_of(tmp_path, backbone, samples, 160)
    model = trainer.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved
    assert not any("language_model" in name or "query_tokens" in name or "dms." in name for name in moved)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    # the second word of a caption is one of eight colors
    model.eval()
    batch = trainer.data_collator(samples)
    words = torch.stack([row[row != -100][1] for row in batch["labels"]])
    with torch.no_grad():
        tokens = torch.stack(list(model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output))
    colors = words.unique()
    said = colors[torch.cdist(tokens[:, 1], model.get_input_embeddings().weight[colors]).argmin(1)]
    assert (said == words).float().mean() > 0.5


@pytest.mark.parametrize("missing", [1, 8])
def test_a_sample_without_an_image_is_refused(tmp_path, missing):
    samples = load_samples("easy-vqa", "train", "caption", limit=8)
    samples = [*(sample.replace(image=None) for sample in samples[:missing]), *samples[missing:]]
    with pytest.raises(ValueError, match=f"needs one image a sample, got {8 - missing} for 8 samples"):
        trainer_of(tmp_path, "demo-blip2", samples, 1).train()
