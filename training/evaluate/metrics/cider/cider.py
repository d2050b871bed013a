"""CIDEr-D, BLEU and ROUGE-L as a module of `evaluate`."""

import datasets
import evaluate

import modeling_dms.training.evaluate.metrics.captions as captions


class CaptionScores(evaluate.Metric):
    """See `caption_scores` for the options of `compute` and what it returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L of captions, as of the COCO tool but its tokenizer.",
            citation="Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015",
            inputs_description=captions.caption_scores.__doc__ or "",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
            reference_urls=["https://github.com/salaniz/pycocoevalcap"],
        )

    def _compute(self, predictions, references, **options) -> dict[str, float | str]:
        return captions.caption_scores(predictions, references, **options)
