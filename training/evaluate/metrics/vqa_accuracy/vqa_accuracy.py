"""VQA accuracy as a module of `evaluate`."""

import datasets
import evaluate

import modeling_dms.training.evaluate.metrics.vqa as vqa


class VQAAccuracy(evaluate.Metric):
    """See `vqa_accuracy` for the options of `compute` and what it returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of answers against several annotators, with the normalisation of VQA v2.",
            citation="Antol et al., VQA: Visual Question Answering, ICCV 2015",
            inputs_description=vqa.vqa_accuracy.__doc__ or "",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://visualqa.org/evaluation.html"],
        )

    def _compute(self, predictions, references, **options) -> dict[str, float]:
        return vqa.vqa_accuracy(predictions, references, **options)
