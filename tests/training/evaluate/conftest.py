"""A model, its task and samples for tests of evaluations."""

import pytest

from modeling_dms.training.data import load_easy_vqa
from modeling_dms.training.evaluate.run import one_per_image
from modeling_dms.training.evaluate.tasks import VisualQuestionAnswering
from modeling_dms.training.models.loading import load


ANSWERS = ["blue", "circle", "green", "no", "rectangle", "red", "triangle", "yes"]


@pytest.fixture(scope="module")
def vqa():
    """The demo's LLaVA, its task, and test samples."""
    model, processor = load("demo-llava")
    return model.eval(), VisualQuestionAnswering(processor, ANSWERS), one_per_image(load_easy_vqa("test"), 14, 0)
