"""`accelerate launch -m lvlm_decode_evals.run pope --model ... --method vcd --out DIR`: one evaluation over several processes.

Takes the options of `lvlm-decode eval`. Each process asks its share of the batches and appends to its own file; the
main process merges them by id. The files are the same as those of one process, also after a kill and another start,
with any number of processes. On a machine without cards write `accelerate launch --multi_gpu --num_processes 2`: its
`--cpu` starts several processes only through MPI.
"""

from __future__ import annotations

import typer

from .commands import eval_command


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(eval_command)
    app()


if __name__ == "__main__":
    main()
