"""A first stage for image tokens: each learns to be a word of the image's text, as the language model embeds words."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_dms.training.trainer import DMSTrainer


# words of a text that image tokens stand for, one after the other and again from the first; an image with more image
# tokens says its text several times
WORDS = 8


class AlignmentTrainer(DMSTrainer):
    """Trains what makes image tokens without running the language model.

    The targets are the input embeddings of the label's first eight tokens (a shorter label goes on with its last one,
    the end token), and the loss is `alignment_loss`. It takes the place of the language model's part in image-grounded
    text generation, the first stage of BLIP-2 (Li et al., ICML 2023): as tokens that can be read from the start,
    queries neither collapse nor wait for the language model. The objective is our own choice.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        unwrapped = self.accelerator.unwrap_model(model)
        rows = [row[row != -100] for row in inputs["labels"]]
        words = torch.stack([F.pad(row[:WORDS], (0, WORDS - len(row[:WORDS])), value=int(row[-1])) for row in rows])
        pixel_values = inputs["pixel_values"]
        if len(pixel_values) != len(words):
            raise ValueError(
                f"stage='align' needs one image a sample, got {len(pixel_values)} for {len(words)} samples: leave "
                "`missing` out of image_families"
            )
        tokens = torch.stack(list(unwrapped.get_image_features(pixel_values, return_dict=True).pooler_output))
        embeddings = unwrapped.get_input_embeddings().weight
        loss = alignment_loss(tokens, embeddings[words], embeddings.var())
        return (loss, {"tokens": tokens}) if return_outputs else loss


def alignment_loss(tokens: Tensor, targets: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error of image tokens to the embeddings of words, over the variance of all embeddings.

    Args:
        tokens: (B, N, D).
        targets: (B, W, D); token i has target i mod W.
        variance: (), of the embeddings: 1 is what tokens that say nothing cost.

    Returns:
        (), at least 0.
    """
    repeated = targets[:, torch.arange(tokens.shape[1]) % targets.shape[1]]  # (B, N, D)
    return F.mse_loss(tokens.float(), repeated.float()) / variance
