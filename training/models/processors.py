"""The processor of a checkpoint, made complete by its model's configuration and held against it."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoProcessor,
    Blip2Processor,
    InstructBlipProcessor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from modeling_dms.training.data.collator import image_token


def read_processor(name: str | Path) -> ProcessorMixin:
    """The processor of a checkpoint, as its files have it.

    Raises:
        ValueError: if it cannot be read, or half of it is missing.
        OSError: naming the file that is neither here nor to be had.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ImportError):
        raise
    except Exception as error:  # what transformers stumbles over in files that are damaged or of another kind
        raise ValueError(f"the processor of {name} cannot be read: {error}") from error
    if not isinstance(processor, ProcessorMixin):  # what transformers makes do with
        missing = "image processor" if isinstance(processor, PreTrainedTokenizerBase) else "tokenizer"
        raise ValueError(
            f"{name} holds a {type(processor).__name__}, and no {missing} beside it: save the processor of its base "
            "model there"
        )
    return processor


def load_processor(name: str | Path, config: PreTrainedConfig, generates: bool = True) -> ProcessorMixin:
    """The processor that was saved with a model, ready for batches.

    Files of fine-tuned models and of older versions of transformers leave out a padding token, for which the end token
    is taken, and what the model's configuration says as well. Decoder-only models go on from the end of each row, so
    their prompts are padded on the left.

    Args:
        name: a folder or Hub id.
        config: of the checkpoint's model.
        generates: whether the model generates, from prompts that hold image tokens.

    Raises:
        ValueError: naming what is missing, cannot be read, or does not fit the model.
        OSError: naming the file that is neither here nor to be had.
    """
    processor = read_processor(name)
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:  # prompts are marked by the places of their tokens, which others do not tell
        raise ValueError(f"{name} has a {type(tokenizer).__name__}: a fast tokenizer is needed (tokenizer.json)")
    # a padding token that was added without an embedding is none
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= config.get_text_config(decoder=True).vocab_size:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{name} lacks tokenizer.pad_token, and tokenizer.eos_token to take in its place")
        tokenizer.pad_token = tokenizer.eos_token
    written, _ = type(processor).get_processor_dict(name)
    if getattr(processor, "num_query_tokens", None) not in (None, config.to_dict().get("num_query_tokens")):
        raise ValueError(
            f"the processor counts otherwise than the model: processor.num_query_tokens of {name} is "
            f"{processor.num_query_tokens}, its model's configuration says {config.num_query_tokens}"
        )
    for field, value in _repeated(processor, config).items():
        if written.get(field) is None:
            if value is None:
                raise ValueError(f"{name} lacks processor.{field}, and its model's configuration does not say it")
            setattr(processor, field, value)
    if generates:
        token = image_token(processor)
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [config.image_token_id]:
            raise ValueError(
                f"the image token of {name} is {config.image_token_id} in its model's configuration, but its tokenizer"
                f" reads {token!r}, which its processor writes, as {ids}"
            )
        if not config.is_encoder_decoder:
            tokenizer.padding_side = "left"
    return processor


def _repeated(processor: ProcessorMixin, config: PreTrainedConfig) -> dict[str, Any]:
    """What a processor repeats of its model's configuration, so as to count image tokens; `None` where that does not
    say it."""
    if isinstance(processor, (LlavaProcessor, LlavaNextProcessor)):
        strategy = config.vision_feature_select_strategy
        return {
            "patch_size": config.vision_config.to_dict().get("patch_size"),
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": int(strategy == "default"),  # which leaves out one
        }
    if isinstance(processor, InternVLProcessor):
        return {"image_seq_length": config.image_seq_length}
    # a model for retrieval that knows no image token takes its prompts without
    if isinstance(processor, (Blip2Processor, InstructBlipProcessor)) and config.image_token_id is not None:
        return {"num_query_tokens": config.num_query_tokens}
    return {}
