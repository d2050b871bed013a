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
# which families of self-made damage a kind resembles, where that is not the one of its family's name: calibration has
# seen the kind in disguise unless those are left out
_RESEMBLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("image:fog", "image:imagenet_c/fog"), ("exposure",)),
    # flakes, ice and drops cover the picture, and dim it
    "image:imagenet_c/snow": ("noise", "exposure"),
    "image:imagenet_c/frost": ("occlusion", "exposure"),
    "image:imagenet_c/spatter": ("occlusion",),
    **dict.fromkeys((f"image:{kind}" for kind in FAMILIES["image"]["digital"]), ("resolution",)),
    "image:glitch": ("order",),
    **dict.fromkeys((f"image:{kind}" for kind in FAMILIES["image"]["geometric"]), ("order",)),
    **dict.fromkeys((f"image:{kind}" for kind in FAMILIES["image"]["color"]), ("exposure",)),
    **dict.fromkeys(("image:invert", "image:solarize", "image:color_cast", "image:imagenet_c/saturate"), ("color",)),
    "image:channel_swap": ("color",),
    **dict.fromkeys((f"text:{kind}" for kind in FAMILIES["text"]["characters"]), ("misspelt",)),
}
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


def self_made_families(name: str) -> tuple[str, ...]:
    """The families of calibration's self-made damage that a corruption resembles, which must be left out for it to be
    unseen.

    Raises:
        ValueError: for an unknown name.
    """
    family = family_of(name)
    known = damage.FAMILIES[0] if name.startswith("image") else damage.FAMILIES[1]
    return _RESEMBLES.get(name, (family,) if family in known else ())


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
        default_factory=lambda: ["noise", "blank", "blur", "occlusion", "missing"],
        metadata={"help": "Families of image corruptions that training sees; named twice: twice as often."},
    )
    text_families: list[str] = field(
        default_factory=lambda: ["word_drop", "random_words", "shuffle", "missing"],
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
            if overlap := [family for family in held_out if family in seen]:
                raise ValueError(f"held_out_{modality}_families: {', '.join(overlap)} seen by {modality}_families")

    def families(self, modality: str, group: Literal["seen", "held out"]) -> list[str]:
        """The families of `"image"` or `"text"` in a group."""
        seen, held_out = {
            "image": (self.image_families, self.held_out_image_families),
            "text": (self.text_families, self.held_out_text_families),
        }[modality]
        return seen if group == "seen" else held_out
