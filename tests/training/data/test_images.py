"""Images of every kind are shown to a model as a person sees them in a viewer, or an error names the sample."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from modeling_dms.training.corruptions import corrupt
from modeling_dms.training.data import Sample


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def seen(image):
    return Sample("sample-7", image, None, "what?").load_image()


def pixels(image):
    return np.asarray(seen(image)).astype(int)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_close(found, expected, within=1):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= within, (found, expected)


# ---- grey levels that are numbers


def tiff(values, kind, order):
    """A file of grey levels of one strip; `kind`: 1 unsigned, 2 signed, 3 floating point."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    fields = [(256, values.shape[1]), (257, values.shape[0]), (258, 8 * values.dtype.itemsize), (259, 1), (262, 1)]
    fields += [(273, 10 + 12 * 10 + 4), (277, 1), (278, values.shape[0]), (279, len(data)), (339, kind)]
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HIH", 42, 8, len(fields))
    return head + b"".join(struct.pack(f"{order}HHIHH", t, 3, 1, v, 0) for t, v in fields) + bytes(4) + data


LEVELS = np.array([[0, 51, 102], [153, 204, 255]])  # as 8 bits


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("dtype", "kind", "scale"),
    [("u2", 1, 257), ("f4", 3, 1 / 255), ("f4", 3, 1), ("f4", 3, 257), ("i4", 2, 1), ("i4", 2, 257)],
)
def test_grey_levels_in_files_are_scaled_by_their_range(dtype, kind, scale, order):
    file = tiff((LEVELS * scale).astype(dtype), kind, order)
    assert np.array_equal(pixels(file)[..., 0], LEVELS)
    assert np.array_equal(pixels(Image.open(io.BytesIO(file))), pixels(file))


def test_sixteen_bits_are_sixteen_bits_however_dark():
    dark = np.array([[0, 255], [129, 128]], dtype=np.uint16)
    files = [tiff(dark, 1, "<"), tiff(dark, 1, ">"), encoded(Image.fromarray(dark), "PNG")]
    files.append(b"P5 2 2 65535\n" + dark.astype(">u2").tobytes())
    for image in (*files, Image.fromarray(dark)):
        assert pixels(image)[..., 0].tolist() == [[0, 1], [1, 0]]
    ten_bits = b"P5 2 1 1023\n" + np.array([1023, 341], ">u2").tobytes()
    assert pixels(ten_bits)[..., 0].tolist() == [[255, 85]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.float32([[-1, 1]]), "from -1 to 1"),
        (np.float32([[np.nan, 1]]), "nan"),
        (np.float32([[0, np.inf]]), "inf"),
        (np.float32([[0, 70_000]]), "to 70000, expected 0 to 1 or 0 to 255 or 0 to 65535"),
        (np.int32([[-3, 200]]), "from -3 to 200"),
        (np.int32([[0, 65_536]]), "expected 0 to 255 or 0 to 65535"),
    ],
)
def test_numbers_that_are_no_grey_levels_are_named(values, said):
    with pytest.raises(ValueError, match=f"sample-7.*{said}"):
        seen(Image.fromarray(values))


# ---- color spaces


def profile(space, primaries=None, gamma=1.0):
    """An ICC profile (version 2) of one curve: of grey, or of RGB with these primaries, rows of XYZ under D50."""

    def fixed(*numbers):
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"made for a test\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)}
    tags[b"wtpt"] = b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for channel, row in zip((b"r", b"g", b"b"), () if primaries is None else primaries, strict=False):
        tags |= {channel + b"XYZ": b"XYZ " + bytes(4) + fixed(*row), channel + b"TRC": curve}
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I", 0x02100000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += fixed(0.9642, 1, 0.8249)
    size = struct.pack(">I", place + len(body))
    return size + bytes(4) + head.ljust(120, b"\0") + table + body


SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
WIDE = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])  # Display P3


def in_srgb(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


WIDE_COLORS = [(200, 100, 50), (120, 160, 90), (255, 255, 255), (128, 128, 128)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "PIL"])
def test_a_wide_gamut_photograph_is_shown_in_srgb(kind):
    image = Image.new("RGB", (4, 1))
    image.putdata(WIDE_COLORS)
    icc = profile(b"RGB ", WIDE, 2.2)
    expected = in_srgb((np.array(WIDE_COLORS) / 255) ** 2.2 @ WIDE @ np.linalg.inv(SRGB))
    assert np.abs(expected - WIDE_COLORS).max() > 15  # red is redder than its numbers
    if kind == "PIL":
        image.info["icc_profile"] = icc
        given = image
    else:
        given = encoded(image, kind, icc_profile=icc, **({"lossless": True} if kind == "WEBP" else {}))
    assert_close(pixels(given)[0], expected, within=2)
    # what was shown once is not converted again
    assert np.array_equal(pixels(seen(given)), pixels(given))


def test_profiles_of_grey_of_transparency_and_of_palettes():
    grey = encoded(Image.new("L", (2, 1), 55), "PNG", icc_profile=profile(b"GRAY"))
    assert_close(pixels(grey)[0, 0], in_srgb(np.full(3, 55 / 255)))
    wide = profile(b"RGB ", WIDE, 2.2)
    expected = in_srgb((np.array(WIDE_COLORS[0]) / 255) ** 2.2 @ WIDE @ np.linalg.inv(SRGB))
    clear = Image.new("RGBA", (2, 1), (*WIDE_COLORS[0], 255))
    clear.putpixel((1, 0), (*WIDE_COLORS[0], 0))
    assert_close(pixels(encoded(clear, "PNG", icc_profile=wide))[0], [expected, WHITE], within=2)
    palette = Image.new("RGB", (2, 1), WIDE_COLORS[0]).quantize(2)
    assert_close(pixels(encoded(palette, "PNG", icc_profile=wide))[0, 0], expected, within=2)


@pytest.mark.parametrize(
    "icc",
    [b"no profile", profile(b"GRAY"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()],
    ids=["broken", "of another space", "needless"],
)
def test_a_profile_that_cannot_be_or_need_not_be_applied_changes_nothing(icc):
    colors = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colors)
    image.info["icc_profile"] = icc
    assert np.array_equal(pixels(image), colors)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PIL"])
def test_four_inks_are_shown_in_their_color(kind):
    """Adobe's JPEG files, which Pillow writes, hold inks inverted."""
    for inks, color in (((0, 255, 255, 0), RED), ((255, 255, 0, 0), BLUE), ((0, 0, 0, 0), WHITE)):
        image = Image.new("CMYK", (8, 8), inks)
        assert_close(pixels(image if kind == "PIL" else encoded(image, kind))[4, 4], color)


def test_lab_hsv_and_ycbcr():
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (1, 1), (120, 160, 90)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    del lab.info["icc_profile"]
    assert_close(pixels(lab)[0, 0], (120, 160, 90), within=3)
    assert_close(pixels(encoded(lab, "TIFF"))[0, 0], (120, 160, 90), within=3)
    assert_close(pixels(Image.new("LAB", (1, 1), (255, 128, 128)))[0, 0], WHITE)
    assert_close(pixels(Image.new("HSV", (1, 1), (85, 255, 255)))[0, 0], GREEN, within=2)
    assert_close(pixels(Image.new("YCbCr", (1, 1), (76, 85, 255)))[0, 0], RED, within=2)


# ---- transparency


def test_transparency_of_every_kind_lies_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    own = palette.copy()
    own.putpalette([*RED, 255, *BLUE, 0], "RGBA")
    half = Image.new("RGBA", (2, 1), (*RED, 255))
    half.putpixel((1, 0), (*BLUE, 0))
    shown = [
        encoded(palette, "PNG", transparency=1),
        encoded(palette, "PNG", transparency=bytes([255, 0])),
        encoded(palette, "GIF", transparency=1),
        own,
        half,
        half.convert("RGBa"),
        encoded(half, "WEBP", lossless=True),
    ]
    for image in shown:
        assert pixels(image)[0].tolist() == [list(RED), list(WHITE)]
    grey = Image.new("LA", (1, 1), (0, 128)), Image.new("LA", (1, 1), (0, 128)).convert("La")
    for image in grey:
        assert_close(pixels(image)[0, 0], (127, 127, 127))


# ---- frames and orientation


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_seen(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(file)).n_frames == 3
    assert pixels(file)[4, 4].tolist() == list(RED)


def corners(image):
    """Which color is in the top left, top right, bottom left and bottom right."""
    names = {RED: "r", GREEN: "g", BLUE: "b", WHITE: "w"}
    right, bottom = image.width - 4, image.height - 4
    found = [image.getpixel(place) for place in ((3, 3), (right, 3), (3, bottom), (right, bottom))]
    return "".join(
        names[min(names, key=lambda n, f=color: sum(abs(a - b) for a, b in zip(n, f, strict=True)))] for color in found
    )


# what a camera that was held in these ways has stored of a picture with the corners "rgbw"
STORED = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "gwrb", 7: "wgbr", 8: "brwg"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_upright_however_the_camera_was_held(tmp_path, orientation, kind):
    size = (32, 16) if orientation < 5 else (16, 32)
    stored = Image.new("RGB", size)
    half = (size[0] // 2, size[1] // 2)
    for name, place in zip(STORED[orientation], ((0, 0), (half[0], 0), (0, half[1]), half), strict=True):
        color = {"r": RED, "g": GREEN, "b": BLUE, "w": WHITE}[name]
        stored.paste(color, (*place, place[0] + half[0], place[1] + half[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(stored, kind, exif=exif)
    (tmp_path / "photo").write_bytes(file)
    for image in (file, tmp_path / "photo", Image.open(io.BytesIO(file))):
        shown = seen(image)
        assert (shown.size, corners(shown)) == ((32, 16), "rgbw")
        assert corners(seen(shown)) == "rgbw"  # not turned twice
    damaged = corrupt(Sample("a", file, None, "what?"), "image:dark", 1)
    assert damaged.load_image().size == (32, 16)
