"""Image-text retrieval recall as a module of `evaluate`."""

import datasets
import evaluate

import modeling_dms.training.evaluate.metrics.retrieval as retrieval


class RetrievalRecall(evaluate.Metric):
    """Predictions are the rows of the similarity matrix, one an image; references the indices of each image's texts.

    See `retrieval_recall` for the options of `compute` and what it returns.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall at k of texts for images and of images for texts.",
            citation="Karpathy & Fei-Fei, Deep Visual-Semantic Alignments for Image Descriptions, CVPR 2015",
            inputs_description=retrieval.retrieval_recall.__doc__ or "",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, **options) -> dict[str, float]:
        return retrieval.retrieval_recall(predictions, references, **options)
