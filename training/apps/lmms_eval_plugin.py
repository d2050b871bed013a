"""DMS checkpoints in lmms-eval: `lmms-eval --model dms --model_args pretrained=NAME --tasks ...`.

setup.py registers `manifest` in the entry-point group `lmms_eval.models`.
"""

# lmms-eval is an extra of its own, which the development environment does not hold
# pyright: reportMissingImports=false

import math
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from loguru import logger
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Blip2Processor, GenerationConfig

from modeling_dms.training.data.samples import as_seen
from modeling_dms.training.models.loading import load


def manifest() -> Any:
    """What lmms-eval's registry asks an entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # loads this module's entry point in turn

    return ModelManifest("dms", simple_class_path=f"{__name__}.{DMS.__name__}")


class DMS(lmms):
    """A BLIP-2, LLaVA, InternVL or DMS checkpoint. Its images are weighed against all of the prompt's text.

    Args:
        pretrained: a folder, a Hub id, or a checkpoint that ships with this package (`"demo-llava"`, `"demo-blip2"`).
        batch_size: prompts run at once, some of them perhaps without an image.
        device: default: a GPU if there is one; with several processes always the one that accelerate assigns.
        dtype: of the backbone; `"auto"` is the checkpoint's.
        attn_implementation: as in `from_pretrained`.
        prompt: what is made of a task's text where the checkpoint has no chat template. Images stand in front.
        dms: fields of [`DMSConfig`] that replace the checkpoint's, such as `scheduler="uniform"`.

    Raises:
        ValueError: for a checkpoint of another model type, or a field that `DMSConfig` does not have or refuses.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        prompt: str = "question: {} answer:",
        **dms: Any,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.batch_size, self.prompt = int(batch_size), prompt
        model, self.processor = load(pretrained, dms, dtype=dtype, attn_implementation=attn_implementation)
        self.model: Any = model
        self.model.to(self.device)
        scheduler = model.config.dms_config.scheduler
        if scheduler in ("rule", "learned") and not self.model.dms.calibration.is_calibrated:
            logger.warning(
                f"{pretrained} is not calibrated: until `model.calibrate` or training changes that, its {scheduler} "
                "scheduler weighs uniformly, and it answers as the vanilla checkpoint"
            )

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, each up to the first of its task's stop strings.

        Raises:
            ValueError: naming the sample that has more images than the model takes, or something other than images.
        """
        answers = []
        tokenizer = self.processor.tokenizer
        batches = Collator([request.args for request in requests], lambda args: -len(args[0]), grouping=True)
        for batch in self._progress(batches):
            given = batch[0][1]  # grouped: the same in all of them
            until = given.get("until") or []
            until = [until] if isinstance(until, str) else until
            options = {**_generation(given), "stop_strings": until or None, "tokenizer": tokenizer}
            rows, prompt, found = [self._encode(args) for args in batch], 0, [""] * len(batch)
            positions = math.inf
            if not self.model.config.is_encoder_decoder:
                language = self.model.config.get_text_config(decoder=True)
                positions = getattr(language, "max_position_embeddings", positions)
            asked = [place for place, row in enumerate(rows) if len(row["input_ids"]) < positions]
            for args in [args for place, args in enumerate(batch) if place not in asked]:
                logger.warning(f"sample '{args[4]}/{args[3]}' is not answered: its prompt leaves no room for that")
            if asked:
                inputs = self._pad([rows[place] for place in asked], "left")
                if not self.model.config.is_encoder_decoder:
                    prompt = inputs["input_ids"].shape[1]
                    # past its last position OPT would raise an IndexError
                    options["max_new_tokens"] = min(options["max_new_tokens"], positions - prompt)
                generated = self.model.generate(**inputs, **options)[:, prompt:]
                said = tokenizer.batch_decode(generated, skip_special_tokens=True)
                for place, answer in zip(asked, said, strict=True):
                    for stop in until:
                        answer = answer.split(stop)[0]
                    found[place] = answer
            answers += found
        return batches.get_original(answers)

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation *minus* its log-probability, a mean over its tokens, and whether it is the greedy one.

        A loss in spite of the name: lmms-eval takes the choice where it is lowest, and its own models return that.

        Raises:
            ValueError: naming the sample that has more images than the model takes, or something other than images.
        """
        if unwrap_generation_output((0.0, True))[0] != (0.0, True):
            logger.warning(
                "this lmms-eval makes text of the numbers that `loglikelihood` returns, for any model, and will fail "
                "to score multiple_choice tasks (0.7.3 does)"
            )
        scores = []
        batches = Collator([request.args for request in requests], lambda args: -len(args[0]))
        for batch in self._progress(batches):
            rows = [self._encode(args) for args in batch]
            targets = [self._continuation(args, row["text"]) for args, row in zip(batch, rows, strict=True)]
            begins, decoder = [0] * len(rows), {}
            if self.model.config.is_encoder_decoder:
                start = self.model.config.get_text_config(decoder=True).decoder_start_token_id
                shifted = [F.pad(target, (1, -1), value=start) for target in targets]
                decoder["decoder_input_ids"] = pad_sequence(shifted, batch_first=True).to(self.device)
            else:
                begins = [len(row["input_ids"]) - 1 for row in rows]
                for row, target in zip(rows, targets, strict=True):
                    row["input_ids"] = torch.cat([row["input_ids"], target])
                    row["modality_ids"] = F.pad(row["modality_ids"], (0, len(target)))  # what follows is not weighed
            # not on the left: without `position_ids` Llama counts padding
            logits = self.model(**self._pad(rows, "right"), **decoder).logits.float().cpu()
            for row, begin, target in zip(logits, begins, targets, strict=True):
                predicted = row[begin : begin + len(target)]
                greedy = bool((predicted.argmax(-1) == target).all())
                scores.append((float(F.cross_entropy(predicted, target)), greedy))
        return batches.get_original(scores)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: these checkpoints were trained on single questions."""
        raise NotImplementedError("dms answers single questions; tasks of several rounds are not supported")

    def _progress(self, batches: Collator) -> tqdm:
        return tqdm(list(batches.get_batched(n=self.batch_size)), desc="Model Responding", disable=self.rank != 0)

    def _encode(self, args: tuple) -> dict[str, Any]:
        """The prompt of a request: `text`, `input_ids` and `modality_ids` (L,), `pixel_values` if it has images."""
        context, _, doc_to_visual, doc_id, task, split = args
        name, visuals = f"{task}/{doc_id}", doc_to_visual(self.task_dict[task][split][doc_id]) or []
        single = isinstance(self.processor, Blip2Processor)
        if not all(isinstance(visual, Image.Image) for visual in visuals) or (single and len(visuals) > 1):
            raise ValueError(f"sample {name!r}: expected {'one image' if single else 'images'} or none, got {visuals}")
        images = [as_seen(visual) for visual in visuals]
        token, bos = str(self.processor.image_token), self.processor.tokenizer.bos_token
        context = context.replace(token, "").strip()
        if self.processor.chat_template:
            content = [{"type": "image"}] * len(images) + [{"type": "text", "text": context}]
            messages: list[Any] = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            # the BLIP-2 processor puts its image tokens in front itself
            text = token * (0 if single else len(images)) + self.prompt.format(context)
        special = not (bos and text.startswith(bos))  # some chat templates begin with it
        encoded = self.processor(images=images or None, text=text, add_special_tokens=special, return_tensors="pt")
        ids = encoded["input_ids"]
        inferred = self.model.infer_modality_ids(ids)
        return {**encoded, "text": text, "input_ids": ids[0], "modality_ids": inferred[0]}

    def _continuation(self, args: tuple, text: str) -> Tensor:
        """The tokens (T,) that are to follow a prompt."""
        _, target, _, doc_id, task, split = args
        if not isinstance(target, str):
            target = f" {target(self.task_dict[task][split][doc_id])}"
        # in its place: alone, some tokenizers put a space of their own in front
        tokenizer = self.processor.tokenizer
        whole, before = tokenizer([text + target, text], add_special_tokens=False)["input_ids"]
        return torch.tensor(whole[len(before) :])

    def _pad(self, rows: list[dict[str, Any]], side: str) -> dict[str, Tensor]:
        """What the model takes: `input_ids`, `attention_mask` and `modality_ids` (B, L), and `pixel_values`.

        Raises:
            ValueError: for a family whose images need more than their pixels to be read.
        """
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "modality_ids": 0}
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        batch = {
            name: pad_sequence([row[name] for row in rows], True, padding_value=value, padding_side=side)
            for name, value in fill.items()
        }
        others = {name for row in rows for name in row} - {*fill, "text", "pixel_values"}
        if others:
            raise ValueError(
                f"{type(self.processor).__name__} gives more than pixels of images, {', '.join(sorted(others))}: the "
                "plugin takes families such as LLaVA, InternVL and BLIP-2"
            )
        pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels).to(self.model.dtype)
        return {name: value.to(self.device) for name, value in batch.items()}


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    """What `generate` knows of a task's options. Like lmms-eval's own models, it samples only at a temperature."""
    sample = bool(options.get("temperature")) and options.get("do_sample", True)
    known = GenerationConfig().to_dict().keys() - (set() if sample else {"temperature", "top_p", "top_k"})
    given = {name: value for name, value in options.items() if name in known and value is not None}
    return {"max_new_tokens": 1024, **given, "do_sample": sample}
