"""Pictures as models take them: 8-bit RGB, of files of any depth. What cannot be converted rightly is refused, because a
picture that turned white or black is answered as if it were one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_decode.errors import FileFormatError, MissingFileError

# The most pixels a picture may have. Decoding one takes three bytes a pixel, and models see at most a few million.
MOST_PIXELS = 100_000_000
# A 16-bit picture whose values stay below this would be black on 16 of 255 levels: its range is another than 16 bits.
_DARK_16 = 4096
_FULL_16 = 65535


def open_picture(path: Path, turn: bool = False) -> Any:
    """The RGB PIL image of a file, its first frame.

    turn: follow the orientation a camera noted (EXIF), as transformers' `load_image` does; the published evaluations did not.
    Raises MissingFileError, or FileFormatError saying what the picture holds and what to do.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    try:
        if not path.is_file():
            raise MissingFileError(f"image {path} is missing")
        with warnings.catch_warnings():
            # Pillow warns of large pictures; here they are refused below, in words.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise FileFormatError(
                    f"image {path} has {width} x {height} = {width * height} pixels, and at most {MOST_PIXELS} are read; make "
                    "it smaller"
                )
            # Pillow keeps the upper half of 16-bit colours; what the file holds is known before it is loaded only.
            deep = any(";16" in str(tile[3]) for tile in image.tile)
            picture = rgb(ImageOps.exif_transpose(image) if turn else image, f"image {path}")
            highest = max(high for _, high in picture.getextrema())
            if deep and 0 < highest < _DARK_16 // 256:
                raise FileFormatError(
                    f"image {path} has 16 bits a colour and dark values only, so it would turn black; save it with 8 bits a "
                    "channel"
                )
            return picture
    except (FileFormatError, MissingFileError):
        raise
    except Image.DecompressionBombError as error:
        raise FileFormatError(
            f"image {path} has more than the {MOST_PIXELS} pixels that are read; make it smaller"
        ) from error
    # Decoders raise whatever they like: RuntimeError (AVIF), NotImplementedError (DDS), struct.error, KeyError.
    except Exception as error:
        raise FileFormatError(f"image {path} cannot be read ({error})") from error


def rgb(image: Any, where: str) -> Any:
    """A PIL image of any mode as RGB.

    16-bit grey is scaled to 8 bits; what is transparent is laid on white. 32-bit whole and floating numbers are refused: no
    file says which of them is white. Raises FileFormatError.
    """

    if image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image), where)
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "floating-point numbers"
        raise FileFormatError(
            f"{where} holds {kind}, of which nobody knows which is white; save it with 8 bits a channel"
        )
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"), where)
    return image.convert("RGB")


def _from_16_bits(values: np.ndarray, where: str) -> Any:
    from PIL import Image

    highest = int(values.max(initial=0))
    if 0 < highest < _DARK_16:
        raise FileFormatError(
            f"{where} has 16 bits a pixel and values up to {highest} of {_FULL_16} only, so it would turn black; save it with 8 "
            "bits a channel"
        )
    scaled = np.round(values.astype(np.float64) / (_FULL_16 / 255)).clip(0, 255)
    return Image.fromarray(scaled.astype(np.uint8), "L").convert("RGB")


def _on_white(image: Any, where: str) -> Any:
    """An RGBA image on a white ground."""
    from PIL import Image

    ground = Image.new("RGBA", image.size, "white")
    seen: Any = Image.alpha_composite(ground, image).convert("RGB")
    if image.getextrema()[3][0] < 255 and all(low == high for low, high in seen.getextrema()):
        raise FileFormatError(
            f"{where} is transparent and shows nothing but one colour on white; save it without transparency"
        )
    return seen
