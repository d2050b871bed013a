"""Photographs that the package scikit-image carries, all free of copyright, with a caption and a question of ours."""

from pathlib import Path

from modeling_dms.training.data.samples import Sample


# file, caption, question, answer. The woman is Eileen Collins, by NASA, in the public domain; the man by Lav Varshney,
# the cat by Stefan van der Walt and the cup by Rachel Michetti are CC0; the rocket is by SpaceX, in the public domain.
PHOTOGRAPHS = (
    ("astronaut.png", "A woman in orange smiles before a flag .", "is there a woman in the picture?", "yes"),
    ("chelsea.png", "A brown cat looks into the camera .", "is there a dog in the picture?", "no"),
    ("camera.png", "A man in a dark coat looks through a camera on a lawn .", "is there a man in the picture?", "yes"),
    ("coffee.png", "A cup of coffee stands on a wooden table .", "is there a car in the picture?", "no"),
    ("rocket.jpg", "A rocket takes off into a dark sky .", "is there a child in the picture?", "no"),
)


def load_example_photographs() -> list[Sample]:
    """A sample of each of them.

    Raises:
        ImportError: naming the extra that brings scikit-image.
    """
    try:
        import skimage
    except ImportError as error:
        raise ImportError('photographs need the parts extra: pip install "modeling-dms[parts]"') from error

    folder = Path(skimage.__file__).parent / "data"
    return [
        Sample(
            id=f"skimage-{Path(name).stem}", image=folder / name, context=caption, question=question, answers=(answer,)
        )
        for name, caption, question, answer in PHOTOGRAPHS
    ]
