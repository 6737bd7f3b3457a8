"""Render the held-out scenes that ship with the repository: JPEG files and one file of ground truth.

python tools/make_heldout.py [--count 500]
"""

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path

from lvlm_decode_data.scenes import SIZE, render, scene_seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    count = parser.parse_args().count
    here = Path(__file__).resolve().parent.parent / "data" / "heldout"
    scenes = []
    for index in range(count):
        image, scene, _ = render(scene_seed("heldout", index))
        scene = replace(scene, path=here / f"{scene.image_id}.jpg")
        image.save(scene.path, quality=70, optimize=True)
        scenes.append(scene.to_json())
    record = json.dumps({"size": SIZE, "scenes": scenes}, separators=(",", ":")).encode()
    (here / "scenes.json.gz").write_bytes(gzip.compress(record, 9, mtime=0))


if __name__ == "__main__":
    main()
