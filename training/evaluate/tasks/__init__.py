"""What a model is asked, and how its answers are scored."""

from modeling_dms.training.evaluate.tasks.base import Task, score_candidates
from modeling_dms.training.evaluate.tasks.captioning import Captioning
from modeling_dms.training.evaluate.tasks.retrieval import ImageTextMatching, ImageTextRetrieval
from modeling_dms.training.evaluate.tasks.vqa import VisualQuestionAnswering


__all__ = [
    "Captioning",
    "ImageTextMatching",
    "ImageTextRetrieval",
    "Task",
    "VisualQuestionAnswering",
    "score_candidates",
]
