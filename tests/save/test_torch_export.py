"""`torch.export`: programs answer, weigh and signal as the model does, on other inputs than they were made with."""

import functools
import subprocess
import sys

import torch
from torch import nn
from torch.export import Dim, export

from tests import tiny


NAMES = ("input_ids", "attention_mask", "pixel_values")
_FRESH = f"""{tiny.BLOCKED}
import torch

program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2])
torch.save([program(*values) for values in inputs], sys.argv[3])
"""


class Tensors(nn.Module):
    """A model with tensors in and tensors out: logits, weights, then signals."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        decoder = {}
        if self.model.config.is_encoder_decoder:
            decoder["decoder_input_ids"] = input_ids[:, :2]
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            use_cache=False,
            **decoder,
        )
        return out.logits, out.modality_weights, *out.modality_signals.values()


def inputs(count=4, seed=3, damaged=False):
    batch = tiny.clean_samples(count, count, seed)[0]
    return tuple((tiny.noisy(batch) if damaged else batch)[name] for name in NAMES)


def dynamic(backbone):
    """What may differ from the example: the length of LLaVA's prompts, else the size of the batch.

    `LlavaModel.get_image_features` makes a list of the images, which fixes their number.
    """
    if backbone in tiny.LLAVA:
        length = {1: Dim("length", min=8, max=64)}
        return {"input_ids": length, "attention_mask": length, "pixel_values": None}
    batch = Dim("batch", min=2, max=64)
    return {name: {0: batch} for name in NAMES}


@functools.cache
@torch.no_grad()
def exported(backbone, **choices):
    """A calibrated model and its program."""
    # one of its own: of a model that has run in several threads, the length of the prompts counts as fixed
    tensors = Tensors(tiny.calibrated.__wrapped__(backbone, **choices)).eval()
    return tensors, export(tensors, inputs(), dynamic_shapes=dynamic(backbone))


def others(count=4):
    """Of one shape: clean, damaged, and both mixed."""
    clean, damaged = inputs(count, 4), inputs(count, 5, damaged=True)
    mixed = tuple(torch.cat([a[: count // 2], b[count // 2 :]]) for a, b in zip(clean, damaged, strict=True))
    return [clean, damaged, mixed]


def in_advance(model, batch):
    """What the model says where weights are made before the prompt is read, as programs make them."""
    with torch.enable_grad():
        return tuple(part.detach() for part in model(*batch))


def check(program, model, batches):
    """Runs each twice: what is drawn must not be drawn anew."""
    for batch in [*batches, *batches]:
        attended = batch[NAMES.index("attention_mask")].bool()
        (logits, *rest), (wanted, *others) = program(*batch), in_advance(model, batch)
        if logits.shape[:2] == attended.shape:  # what stands at padding means nothing
            logits, wanted = logits[attended], wanted[attended]
        torch.testing.assert_close((logits, *rest), (wanted, *others), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_program_is_the_model():
    tensors, program = exported("llava-llama")
    clean, damaged, _ = batches = others()
    # both sides of the scheduler's branches are asked for
    assert (tensors(*clean)[1] == 0.5).any()
    assert (tensors(*damaged)[1][:, 0] < 0.1).all()
    rows = [tiny.SHORT] * 4, [tiny.PAIR, tiny.SHORT, tiny.PAIR, (9, "i", 9)]
    batches += [tuple(tiny.batch(r, "left")[name] for name in NAMES) for r in rows]
    check(program.module(), tensors, batches)


@torch.no_grad()
def test_a_program_holds_a_trained_scheduler():
    tensors, program = exported("blip2-t5", scheduler="learned", stirred=True)
    batches = [*others(), *others(2), *others(7)]
    weights = torch.cat([tensors(*batch)[1] for batch in batches])
    assert weights[:, 0].std() > 0.1
    assert (weights != 0.5).all()
    check(program.module(), tensors, batches)


@torch.no_grad()
def test_a_saved_program_runs_without_the_package(tmp_path):
    tensors, program = exported("llava-llama")
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(others(), tmp_path / "inputs.pt")
    (tmp_path / "script.py").write_text(_FRESH)
    command = [sys.executable, "script.py", "program.pt2", "inputs.pt", "outputs.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for batch, found in zip(others(), torch.load(tmp_path / "outputs.pt"), strict=True):
        torch.testing.assert_close(found, in_advance(tensors, batch), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_given_weights_nothing_is_scheduled():
    tensors, scheduled = exported("llava-llama")
    model, weights = tensors.model, tiny.uneven(4)

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, pixel_values, modality_weights):
            return self.model(
                input_ids, pixel_values, attention_mask, modality_weights=modality_weights, use_cache=False
            ).logits

    given = Given().eval()
    program = export(given, (*inputs(), weights))
    assert len(program.graph.nodes) < len(scheduled.graph.nodes)
    for other in (weights, weights.flip(1), torch.full((4, 2), 0.5), torch.tensor([[1.0, 0.0]] * 4)):
        batch = (*inputs(seed=6), other)
        torch.testing.assert_close(program.module()(*batch), given(*batch), rtol=1e-4, atol=1e-4)
