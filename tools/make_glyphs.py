"""Crop the emoji glyphs used by the scenes out of a colour-emoji font, once.

    python tools/make_glyphs.py /path/to/NotoColorEmoji.ttf

The cropped PNG files and ``index.json`` (category -> file names) are committed, so nothing needs the font afterwards.
Pillow must be built with FreeType; the font's embedded bitmaps have one size, 109 pixels per em.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# COCO category names with an emoji that shows the thing and nothing else. Names without one (bench, oven,
# surfboard, ...) are left out.
GLYPHS = {
    "person": "🧍🚶🧑👩👨",
    "bicycle": "🚲",
    "car": "🚗🚙🚘",
    "motorcycle": "🏍",
    "airplane": "✈🛩",
    "bus": "🚌🚍",
    "train": "🚆🚂🚄",
    "truck": "🚚🚛",
    "boat": "⛵🚤🛥",
    "traffic light": "🚦🚥",
    "stop sign": "🛑",
    "bird": "🐦🦆🕊",
    "cat": "🐈🐱",
    "dog": "🐕🐶🐩",
    "horse": "🐎🐴",
    "sheep": "🐑🐏",
    "cow": "🐄🐮",
    "elephant": "🐘",
    "bear": "🐻",
    "zebra": "🦓",
    "giraffe": "🦒",
    "backpack": "🎒",
    "umbrella": "☂🌂",
    "handbag": "👜👛",
    "tie": "👔",
    "suitcase": "🧳💼",
    "frisbee": "🥏",
    "sports ball": "⚽🏀🏐",
    "kite": "🪁",
    "skateboard": "🛹",
    "tennis racket": "🎾🏸",
    "bottle": "🍾🍼",
    "wine glass": "🍷",
    "cup": "☕🍵🥤",
    "fork": "🍴",
    "knife": "🔪",
    "spoon": "🥄",
    "bowl": "🥣🍜",
    "banana": "🍌",
    "apple": "🍎🍏",
    "sandwich": "🥪🍔",
    "orange": "🍊",
    "broccoli": "🥦",
    "carrot": "🥕",
    "pizza": "🍕",
    "donut": "🍩",
    "cake": "🎂🍰",
    "chair": "🪑",
    "couch": "🛋",
    "potted plant": "🪴",
    "bed": "🛏",
    "tv": "📺",
    "laptop": "💻",
    "mouse": "🖱",
    "keyboard": "⌨",
    "cell phone": "📱",
    "book": "📕📖📗",
    "clock": "⏰🕒",
    "vase": "🏺⚱",
    "teddy bear": "🧸",
}


def main(font_path: str) -> None:
    here = Path(__file__).resolve().parent.parent / "data" / "glyphs"
    font = ImageFont.truetype(font_path, 109)
    index = {}
    for category, characters in GLYPHS.items():
        index[category] = []
        for character in characters:
            canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
            ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
            box = canvas.getbbox()
            if box is None:
                raise SystemExit(f"{font_path} has no glyph for {character!r} ({category}); use a newer emoji font")
            name = f"{ord(character):x}.png"
            if category == "fork":  # the glyph is a fork beside a knife; a knife is another category
                canvas.paste((0, 0, 0, 0), ((box[0] + box[2]) // 2, 0, 160, 160))
                box = canvas.getbbox()
            canvas.crop(box).quantize(128, method=Image.Quantize.FASTOCTREE).save(here / name, optimize=True)
            index[category].append(name)
    (here / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
