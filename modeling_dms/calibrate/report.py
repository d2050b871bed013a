"""What `calibrate` says of a model and its data."""

import math
from dataclasses import dataclass, field


SEVERITIES = 5  # steps of a report
# a family of which fewer are flagged even at the strongest step is one that the detector is blind to
BLIND = 0.5


@dataclass
class Detection:
    """How well a family of self-made damage is told from clean samples.

    Attributes:
        auroc: area under the ROC curve of the detector's score.
        flagged: share of the damaged samples that is flagged, by five steps of severity, mild to strong.
    """

    auroc: float
    flagged: list[float]


@dataclass
class CalibrationReport:
    """What `calibrate` found. Print it for a table.

    Attributes:
        samples: clean samples used, by modality.
        families: by modality, by family of damage: a [`Detection`] by the fitted detector.
        unseen: the same by one that this family was left out of.
        false_alarm_rate: the rate asked for, of all alarms together.
        alarm_rate: the part of it that each modality has.
        achieved_false_alarm_rate: by modality, the share of new clean samples that are flagged on average, at most:
            not above its part of the rate asked for, but where there are too few samples to tell.
        mismatch_auroc: how well the consistency tells a matched pair from another sample's text.
        consistency: `"canonical"` or `"representations"`, whichever told them apart better; with `" and likelihood
            gain"` or `" and matching head"` where, with a `conflict_prior`, by how much likelier the image makes the
            text, or a matching head of the backbone's own, tells still more.
        lowering: at level 3, by modality, how often the other one alone, and how often both, gave the answer to the
            undamaged sample where this one was damaged and flagged; NaN where that never was.
        spared: the modalities that keep their weight all the same, since the other one cannot stand in for them.
        dropped: those that may lose all of it, since the other one alone answers as well as with a little of them.
        reliability: at level 3, AUROC of telling answers that agree with those to undamaged inputs from others, by the
            probability of the first token, and by `out.reliability` after one look and after a second one; NaN where
            all agree, or none.
        sources: where samples have several sources, by kind of pair: AUROC of telling two sources of one sample from
            those of two samples.
    """

    samples: dict[str, int] = field(default_factory=dict)
    families: dict[str, dict[str, Detection]] = field(default_factory=dict)
    unseen: dict[str, dict[str, Detection]] = field(default_factory=dict)
    false_alarm_rate: float = 0.0
    alarm_rate: float = 0.0
    achieved_false_alarm_rate: dict[str, float] = field(default_factory=dict)
    mismatch_auroc: float | None = None
    consistency: str = "representations"
    lowering: dict[str, tuple[float, float]] = field(default_factory=dict)
    spared: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    reliability: dict[str, float] = field(default_factory=dict)
    sources: dict[str, float] = field(default_factory=dict)

    def blind(self, modality: str) -> list[str]:
        """The families of which even strong damage is mostly not flagged."""
        return [name for name, found in self.families.get(modality, {}).items() if found.flagged[-1] < BLIND]

    def __str__(self) -> str:
        steps = " ".join(f"{step:>4}" for step in range(1, SEVERITIES + 1))
        lines = [f"{'':<9} {'':<14} {'share flagged at severity':<26} {'':>6}   when left out of calibration"]
        lines += [f"{'modality':<9} {'damage':<14} {steps}   {'AUROC':>6}   {steps}   {'AUROC':>6}"]
        for modality, families in self.families.items():
            for name, found in families.items():
                shown = [
                    " ".join(f"{share:>4.2f}" for share in row.flagged) + f"   {row.auroc:>6.3f}"
                    for row in (found, self.unseen[modality][name])
                ]
                lines.append(f"{modality:<9} {name:<14} {'   '.join(shown)}")
        for modality, achieved in self.achieved_false_alarm_rate.items():
            lines.append(
                f"{modality}: by {self.samples[modality]} clean samples, at most {achieved:.2%} of new ones are "
                f"flagged ({self.alarm_rate:.2%} asked for)"
            )
        for modality in self.families:
            if self.blind(modality):
                lines.append(f"{modality}: mostly blind to {', '.join(self.blind(modality))}")
        if self.mismatch_auroc is not None:
            lines.append(f"consistency ({self.consistency}): AUROC {self.mismatch_auroc:.3f} for mismatched pairs")
        for modality, (alone, both) in self.lowering.items():
            if math.isnan(both):  # it never was flagged
                continue
            done = "may lose all weight" if modality in self.dropped else "is lowered"
            done = "keeps its weight all the same" if modality in self.spared else done
            lines.append(
                f"{modality}: what is flagged {done}; without it {alone:.2f} of the answers are those to clean "
                f"inputs, with it {both:.2f}"
            )
        if self.reliability:
            shown = ", ".join(f"{name} {area:.3f}" for name, area in self.reliability.items())
            lines.append(f"answers that agree with those to clean inputs, told from others: AUROC {shown}")
        for kind, area in self.sources.items():
            lines.append(f"sources, {kind}: AUROC {area:.3f} for those of another sample")
        return "\n".join(lines)
