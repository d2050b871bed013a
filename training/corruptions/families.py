"""What corruptions belong together, and which of them training sees."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from modeling_dms.calibrate import damage
from modeling_dms.training.corruptions.registry import NAMES
from modeling_dms.training.names import check_names


# by modality, by family: kinds that look alike share a family, so that a family held out has not been seen in disguise
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "image": {
        "noise": (
            "noise",
            "salt_and_pepper",
            "imagenet_c/gaussian_noise",
            "imagenet_c/shot_noise",
            "imagenet_c/impulse_noise",
            "imagenet_c/speckle_noise",
        ),
        "blank": ("black",),
        "blur": (
            "blur",
            "imagenet_c/defocus_blur",
            "imagenet_c/glass_blur",
            "imagenet_c/motion_blur",
            "imagenet_c/zoom_blur",
            "imagenet_c/gaussian_blur",
        ),
        "occlusion": ("occlusion", "stripes", "clutter"),
        "weather": ("fog", "imagenet_c/snow", "imagenet_c/frost", "imagenet_c/fog", "imagenet_c/spatter"),
        "digital": ("pixelate", "jpeg", "posterize", "glitch", "imagenet_c/pixelate", "imagenet_c/jpeg_compression"),
        "geometric": ("jigsaw", "swirl", "imagenet_c/elastic_transform"),
        "color": (
            "invert",
            "dark",
            "overexposed",
            "low_contrast",
            "solarize",
            "color_cast",
            "imagenet_c/brightness",
            "imagenet_c/contrast",
            "imagenet_c/saturate",
        ),
        "missing": ("missing",),
        # a channel swap is a clean image of other colors
        "mismatch": ("mismatch", "channel_swap"),
    },
    "text": {
        "characters": ("typos", "scramble"),
        "word_drop": ("drop_words",),
        "random_words": ("random_words",),
        "shuffle": ("shuffle_words",),
        "missing": ("missing",),
        "mismatch": ("mismatch",),
    },
}
# seen by every calibrated model: they never count as unseen
CALIBRATION_FAMILIES = {"image": damage.IMAGE_FAMILIES, "text": damage.TEXT_FAMILIES}
_FAMILY_OF = {
    f"{modality}:{kind}": family
    for modality, families in FAMILIES.items()
    for family, kinds in families.items()
    for kind in kinds
}


def family_of(name: str) -> str:
    """The family of a corruption's name, within the name's modality.

    Raises:
        ValueError: for an unknown name.
    """
    check_names("corruption", [name], NAMES)
    return _FAMILY_OF[name]


def names_in(modality: str, families: Iterable[str]) -> list[str]:
    """The names of all corruptions in these families of `"image"` or `"text"`.

    Raises:
        ValueError: for an unknown modality or family.
    """
    if modality not in FAMILIES:
        raise ValueError(f"modality must be one of {', '.join(FAMILIES)}, got {modality!r}")
    names = []
    for family in families:
        check_names(f"{modality} family", [family], FAMILIES[modality])
        names += [f"{modality}:{kind}" for kind in FAMILIES[modality][family]]
    return names


def check_rates(**rates: float) -> None:
    """Raises ValueError, naming the argument, unless these shares are within 0..1 and sum to at most 1."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be within 0..1, got {rate!r}")
    if sum(rates.values()) > 1 + 1e-9:
        raise ValueError(f"{', '.join(rates)} must sum to at most 1, got {' + '.join(map(str, rates.values()))}")


@dataclass
class CorruptionConfig:
    """Which corruptions training sees, how often, and which are held out for evaluation."""

    image_rate: float = field(default=0.3, metadata={"help": "Share of samples with only the image corrupted."})
    text_rate: float = field(default=0.3, metadata={"help": "Share of samples with only the context corrupted."})
    both_rate: float = field(default=0.0, metadata={"help": "Share of samples with both corrupted."})
    image_families: list[str] = field(
        default_factory=lambda: [*CALIBRATION_FAMILIES["image"], "missing"],
        metadata={"help": "Families of image corruptions that training sees; named twice: twice as often."},
    )
    text_families: list[str] = field(
        default_factory=lambda: [*CALIBRATION_FAMILIES["text"], "missing"],
        metadata={"help": "Families of text corruptions that training sees; named twice: twice as often."},
    )
    held_out_image_families: list[str] = field(
        default_factory=lambda: ["weather", "digital", "geometric", "color", "mismatch"],
        metadata={"help": "Families of image corruptions that only evaluation sees."},
    )
    held_out_text_families: list[str] = field(
        default_factory=lambda: ["characters", "mismatch"],
        metadata={"help": "Families of text corruptions that only evaluation sees."},
    )

    def __post_init__(self):
        check_rates(image_rate=self.image_rate, text_rate=self.text_rate, both_rate=self.both_rate)
        for modality in FAMILIES:
            seen, held_out = self.families(modality, "seen"), self.families(modality, "held out")
            for name, families in ((f"{modality}_families", seen), (f"held_out_{modality}_families", held_out)):
                try:
                    names_in(modality, families)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
            for used, by in ((seen, f"{modality}_families"), (CALIBRATION_FAMILIES[modality], "calibration")):
                if overlap := [family for family in held_out if family in used]:
                    raise ValueError(f"held_out_{modality}_families: {', '.join(overlap)} seen by {by}")

    def families(self, modality: str, group: Literal["seen", "held out"]) -> list[str]:
        """The families of `"image"` or `"text"` in a group."""
        seen, held_out = {
            "image": (self.image_families, self.held_out_image_families),
            "text": (self.text_families, self.held_out_text_families),
        }[modality]
        return seen if group == "seen" else held_out

    def group_of(self, name: str) -> Literal["seen", "held out", "other"]:
        """`"seen"` by training or calibration, `"held out"` from both, or `"other"`: in neither list.

        Raises:
            ValueError: for an unknown corruption.
        """
        family, modality = family_of(name), name.partition(":")[0]
        if family in (*self.families(modality, "seen"), *CALIBRATION_FAMILIES[modality]):
            return "seen"
        return "held out" if family in self.families(modality, "held out") else "other"
