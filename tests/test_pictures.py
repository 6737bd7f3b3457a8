"""Pictures of every depth become RGB rightly or are refused in one sentence; never white or black in silence."""

import struct
import zlib

import numpy as np
import pytest
from conftest import shared_path
from PIL import Image

from lvlm_decode.errors import FileFormatError, LvlmDecodeError
from lvlm_decode_evals import pictures
from lvlm_decode_evals.loaders import folder_images
from lvlm_decode_evals.pictures import open_picture

RAMP = np.arange(48, dtype=np.float64).reshape(6, 8) / 47


def levels(image) -> np.ndarray:
    """(H, W) of a grey RGB picture."""
    assert image.mode == "RGB"
    array = np.asarray(image)
    assert (array == array[..., :1]).all()
    return array[..., 0]


def deep_png(value: int, kind: int) -> bytes:
    """A 4 x 4 PNG of one 16-bit value in every colour; kind: 2 RGB, 4 grey with alpha, 6 RGBA."""
    colours, alpha = {2: (3, 0), 4: (1, 1), 6: (3, 1)}[kind]
    pixel = struct.pack(">H", value) * colours + struct.pack(">H", 65535) * alpha

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress((b"\0" + pixel * 4) * 4)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", [2, 4, 6])
def test_deep_colours_are_scaled_or_refused_where_they_would_turn_black(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(deep_png(0x8000, kind))
    assert (levels(open_picture(tmp_path / "a.png")) == 0x80).all()
    (tmp_path / "a.png").write_bytes(deep_png(900, kind))
    with pytest.raises(
        FileFormatError, match=r"a\.png has 16 bits a colour and dark values only.* save it with 8 bits"
    ):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    Image.fromarray(np.round(RAMP * 65535).astype(np.uint16)).save(tmp_path / name)
    found = levels(open_picture(tmp_path / name))
    assert np.abs(found - RAMP * 255).max() <= 0.5


def test_black_and_white_of_sixteen_bits_stay_what_they_are(tmp_path):
    for value, level in ((0, 0), (65535, 255)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / "a.png")
        assert (levels(open_picture(tmp_path / "a.png")) == level).all()


def test_twelve_bits_in_sixteen_are_refused_instead_of_black(tmp_path):
    Image.fromarray(np.round(RAMP * 4095).astype(np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(
        FileFormatError, match=r"a\.png has 16 bits a pixel and values up to 4095 .* save it with 8 bits"
    ):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP.astype(np.float32), "floating-point numbers"),
        (np.round(RAMP * 255).astype(np.float32), "floating-point numbers"),
        (np.round(RAMP * 1e9).astype(np.int32), "32-bit whole numbers"),
        (np.round(RAMP * 255).astype(np.int32), "32-bit whole numbers"),
    ],
)
def test_numbers_without_a_white_are_refused(tmp_path, values, kind):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(FileFormatError, match=rf"a\.tiff holds {kind}, .* save it with 8 bits"):
        open_picture(tmp_path / "a.tiff")


def test_what_is_transparent_lies_on_white(tmp_path):
    palette = Image.new("P", (4, 1))
    palette.putpalette([0, 0, 0, 200, 30, 30, 30, 30, 200] + [0] * 759)
    palette.putdata([0, 1, 2, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    found = np.asarray(open_picture(tmp_path / "p.png"))[0]
    assert found.tolist() == [[255, 255, 255], [200, 30, 30], [30, 30, 200], [255, 255, 255]]
    # Black ink on a transparent ground is black on black for convert("RGB").
    ink = np.zeros((4, 4, 4), np.uint8)
    ink[1, :, 3] = 255
    Image.fromarray(ink).save(tmp_path / "ink.png")
    assert levels(open_picture(tmp_path / "ink.png"))[:, 0].tolist() == [255, 0, 255, 255]


def test_a_picture_that_would_turn_white_is_refused(tmp_path):
    chalk = np.full((4, 4, 4), 255, np.uint8)
    chalk[1, :, 3] = 0
    Image.fromarray(chalk).save(tmp_path / "chalk.png")
    with pytest.raises(FileFormatError, match=r"chalk\.png is transparent and shows nothing but one colour"):
        open_picture(tmp_path / "chalk.png")


def test_opaque_pictures_are_as_pillow_converts_them(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    colours[..., 3] = 255
    image = Image.fromarray(colours)
    for mode, name in (
        ("RGBA", "a.png"),
        ("RGB", "a.bmp"),
        ("L", "b.png"),
        ("1", "c.png"),
        ("P", "d.png"),
        ("CMYK", "e.tiff"),
    ):
        made = image.convert("RGB").convert(mode)
        made.save(tmp_path / name)
        assert np.array_equal(open_picture(tmp_path / name), made.convert("RGB")), mode


def test_a_users_picture_is_turned_and_a_benchmarks_is_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=exif)
    assert folder_images(tmp_path, turn=True).open("a.jpg").size == (4, 8)
    assert folder_images(tmp_path).open("a.jpg").size == (8, 4)


@pytest.mark.filterwarnings("error")
def test_the_limit_of_pixels_is_ours_and_said_in_words(tmp_path, monkeypatch):
    Image.new("1", (13000, 13000)).save(tmp_path / "large.png")
    with pytest.raises(FileFormatError, match="13000 x 13000 = 169000000 pixels, and at most 100000000 are read"):
        open_picture(tmp_path / "large.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    with pytest.raises(FileFormatError, match=r"huge\.png has more than the 100000000 pixels"):
        open_picture(tmp_path / "huge.png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 12)
    Image.new("RGB", (4, 3), "red").save(tmp_path / "small.png")
    assert open_picture(tmp_path / "small.png").size == (4, 3)


def test_whatever_a_decoder_raises_is_one_sentence(tmp_path):
    for name, content in (
        ("a.png", b""),
        ("b.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        ("c.jpg", b"\xff\xd8\xff"),
        ("d.dds", b"DDS " + bytes(200)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileFormatError, match=f"image .*{name} cannot be read"):
            open_picture(tmp_path / name)
    for name in ("x" * 300, "a\0b", "missing.png"):
        with pytest.raises(LvlmDecodeError, match="image"):
            open_picture(tmp_path / name)


def test_recorded_pictures():
    found = np.asarray(open_picture(shared_path("cases/images/g16.png")))
    assert 0 < found.mean() < 254 and found.std() > 1
    assert open_picture(shared_path("cases/images/ok.png")).mode == "RGB"
    with pytest.raises(FileFormatError, match=r"bad\.avif cannot be read"):
        open_picture(shared_path("cases/images/bad.avif"))


@pytest.mark.parametrize("name", ["a\0b", "\ud800.png", "loop"])
def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for allowed in (False, True):
        with pytest.raises(LvlmDecodeError, match=r"^image "):
            folder_images(tmp_path, allow_outside=allowed).open(name)
