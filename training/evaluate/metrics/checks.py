"""What every metric refuses, with the argument's name."""

from collections.abc import Sequence

import numpy as np


def finite(**named) -> tuple[np.ndarray, ...]:
    """The arguments as arrays of floats.

    Raises:
        ValueError: naming the one that is empty, ragged, or holds NaN or infinity.
    """
    arrays = []
    for name, values in named.items():
        try:
            array = np.asarray(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is no array of numbers: {error}") from None
        if not array.size:
            raise ValueError(f"{name} is empty")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
        arrays.append(array)
    return tuple(arrays)


def same_shape(**named) -> tuple[np.ndarray, ...]:
    """`finite`, and all of one shape.

    Raises:
        ValueError: also where shapes differ.
    """
    arrays = finite(**named)
    shapes = {name: array.shape for name, array in zip(named, arrays, strict=True)}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
    return arrays


def in_unit_interval(**named) -> tuple[np.ndarray, ...]:
    """`same_shape`, and all within [0, 1].

    Raises:
        ValueError: also naming the one that is not.
    """
    arrays = same_shape(**named)
    for name, array in zip(named, arrays, strict=True):
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} is outside [0, 1]")
    return arrays


def with_references(predictions: Sequence, references: Sequence[Sequence]) -> None:
    """At least one sample, and at least one reference for each.

    Raises:
        ValueError: naming the argument, and the index of the sample, where this is not so.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references")
    if not len(predictions):
        raise ValueError("predictions is empty")
    for i, own in enumerate(references):
        if not len(own):
            raise ValueError(f"references[{i}] is empty")


def texts_with_references(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """`with_references`, and all of them strings.

    Raises:
        ValueError: also naming the first that is not.
    """
    with_references(predictions, references)
    for i, (prediction, own) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{i}] is {prediction!r}, not a string")
        if isinstance(own, str) or not all(isinstance(reference, str) for reference in own):
            raise ValueError(f"references[{i}] is {own!r}, not a list of strings")
