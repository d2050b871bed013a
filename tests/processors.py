"""A tiny processor of every family, made without the Hub: the family's own classes around a small vocabulary, whose
marks have the ids that `families` gives them. Videos, for which some want torchvision, are left out, and Mistral 3,
whose processor cannot be imported without it."""

import functools

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Processor,
    Gemma3Processor,
    Glm4vProcessor,
    Idefics3Processor,
    InstructBlipProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models import smolvlm
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests import families, tiny


# reads out the time of a video's frames, and is asked for in any case
smolvlm.processing_smolvlm.num2words = smolvlm.processing_smolvlm.num2words or str

_MARKS = {
    "qwen": ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<video>"),
    "glm4v": ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>"),
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
    "": ("<image>", "<fake_token_around_image>", "<global-img>", "<video>"),
}
WORDS = (
    "context:",
    "question:",
    "answer:",
    "what",
    "color",
    "is",
    "the",
    "shape",
    "?",
    "a",
    "red",
    "box",
    ".",
    "on",
    "left",
)


def _without_videos(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class that is made without a video processor."""

    class Made(cls):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, video_processor=None, chat_template=chat_template, **kwargs)

    return Made


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words, with the marks of a family's images."""
    image, start, end, video = _MARKS["qwen" if family.startswith("qwen") else family if family in _MARKS else ""]
    taken = {tiny.PAD: "<pad>", tiny.BOS: "<s>", tiny.EOS: "</s>", 0: "<unk>"}
    taken |= {families.IMAGE: image, families.START: start, families.END: end, families.VIDEO: video}
    taken |= dict(enumerate(WORDS, start=10))
    vocabulary = {taken.get(index, f"word{index}"): index for index in range(99)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = {"boi_token": start, "eoi_token": end, "image_token": image, "video_token": video}
    if family == "internvl":
        own = {"start_image_token": start, "end_image_token": end, "context_image_token": image, "video_token": video}
    if family in ("blip-2", "instructblip"):  # whose processors add it themselves
        del own["image_token"]
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=own, padding_side="left", **special)
    made.add_special_tokens({"additional_special_tokens": [start, end]})
    return made


def placeholder(family: str) -> str:
    """What stands for an image in a prompt."""
    return {
        "qwen2_5_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
        "qwen3_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
        "glm4v": "<|begin_of_image|> <|image|> <|end_of_image|>",
        "gemma3": "<start_of_image>",
        "internvl": "<IMG_CONTEXT>",
        "blip-2": "",
        "instructblip": "",
    }.get(family, "<image>")


@functools.cache
def processor(family: str) -> ProcessorMixin:
    """The family's processor for its model in `families`."""
    words, side = tokenizer(family), {"height": 8, "width": 8}
    grid = families._GRID["image_grid_pinpoints"]
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=side)
        return LlavaProcessor(images, words, 4, "default", num_additional_image_tokens=1)
    if family == "llava_next":
        images = LlavaNextImageProcessorPil(size={"shortest_edge": 8}, crop_size=side, image_grid_pinpoints=grid)
        return LlavaNextProcessor(images, words, 4, "default", num_additional_image_tokens=1)
    if family == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=grid)
        return _without_videos(LlavaOnevisionProcessor)(
            images, words, num_image_tokens=4, vision_feature_select_strategy="full"
        )
    if family == "internvl":
        return tiny.InternVLImages(GotOcr2ImageProcessorPil(size=side), words, image_seq_length=4)
    if family == "blip-2":
        return Blip2Processor(BlipImageProcessorPil(size=side), words, num_query_tokens=4)
    if family == "instructblip":
        return InstructBlipProcessor(BlipImageProcessorPil(size=side), words, tokenizer(family), num_query_tokens=4)
    if family == "glm4v":
        images = Glm4vImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 2 * 84**2})
        return _without_videos(Glm4vProcessor)(images, words)
    if family.startswith("qwen"):
        patch = families._PATCH[family]
        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2}
        images = Qwen2VLImageProcessorPil(patch_size=patch, size=size)
        cls = Qwen2_5_VLProcessor if family == "qwen2_5_vl" else Qwen3VLProcessor
        return _without_videos(cls)(images, words)
    if family == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessorPil(size=side), words, image_seq_length=4)
    if family in ("smolvlm", "idefics3"):
        one, longest = {"longest_edge": 16}, {"longest_edge": 16}
        if family == "idefics3":
            images = Idefics3ImageProcessorPil(size=longest, max_image_size=one, do_image_splitting=False)
            return Idefics3Processor(images, words, image_seq_len=4)
        images = SmolVLMImageProcessorPil(size=longest, max_image_size=one, do_image_splitting=False)
        return _without_videos(SmolVLMProcessor)(images, words, image_seq_len=4)
    if family == "paligemma":
        images = SiglipImageProcessorPil(size=side)
        images.image_seq_length = 4
        return PaliGemmaProcessor(images, words)
    raise KeyError(family)
