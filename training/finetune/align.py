"""A first stage for image tokens: each learns to be a word of the image's text, as the language model embeds words."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_dms.training.finetune.trainer import DMSTrainer


# words of a text that image tokens stand for, one after the other and again from the first; an image with more image
# tokens says its text several times
WORDS = 8
# of cosines, as logits
SCALE = 20.0


class AlignmentTrainer(DMSTrainer):
    """Trains what makes image tokens without running the language model.

    The targets are the label's first eight tokens (a shorter label goes on with its last one, the end token), and the
    loss is `alignment_loss`. It takes the place of the language model's part in image-grounded text generation, the
    first stage of BLIP-2 (Li et al., ICML 2023): as tokens that can be read from the start, queries neither collapse
    nor wait for the language model. The objective is our own choice.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        unwrapped = self.accelerator.unwrap_model(model)
        rows = [row[row != -100] for row in inputs["labels"]]
        words = torch.stack([F.pad(row[:WORDS], (0, WORDS - len(row[:WORDS])), value=int(row[-1])) for row in rows])
        pixel_values = inputs.get("pixel_values")
        images = 0 if pixel_values is None else len(pixel_values)
        if images != len(words):
            raise ValueError(
                f"stage='align' needs one image a sample, got {images} for {len(words)} samples: leave "
                "`missing` out of image_families"
            )
        tokens = torch.stack(list(unwrapped.get_image_features(pixel_values, return_dict=True).pooler_output))
        loss = alignment_loss(tokens, words, unwrapped.get_input_embeddings().weight)
        return (loss, {"tokens": tokens}) if return_outputs else loss


def alignment_loss(tokens: Tensor, words: Tensor, embeddings: Tensor) -> Tensor:
    """Tells each image token's word from the other words of the batch, and brings it to the word's embedding.

    The cross-entropy of 20 cos(token, word) over the words of the batch, and the mean squared error over the variance
    of all embeddings: the former tells words apart that the latter finds nearly alike, such as two colors.

    Args:
        tokens: (B, N, D).
        words: (B, W), token ids; image token i stands for word i mod W.
        embeddings: (K, D), what the language model reads for each token id.

    Returns:
        (), at least 0.
    """
    wanted = words[:, torch.arange(tokens.shape[1], device=words.device) % words.shape[1]]  # (B, N)
    known, place = wanted.unique(return_inverse=True)
    cosine = F.normalize(tokens.float(), dim=-1) @ F.normalize(embeddings[known].float(), dim=-1).T  # (B, N, k)
    told = F.cross_entropy(SCALE * cosine.flatten(0, 1), place.flatten())
    return told + F.mse_loss(tokens.float(), embeddings[wanted].float()) / embeddings.var()
