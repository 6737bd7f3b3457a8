"""``python -m lvlm_decode`` is the ``lvlm-decode`` command."""

from .cli import main

main()
