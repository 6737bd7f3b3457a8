"""Examples and exit statuses that the command line prints; one entry per command, checked by the tests. Imports no torch."""

from __future__ import annotations

#: Command, with its group -> example lines.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("lvlm-decode demo", "lvlm-decode demo --images 8 --page quick.html"),
    "methods": ("lvlm-decode methods", "lvlm-decode methods vcd", "lvlm-decode methods --json"),
    "models": ("lvlm-decode models", "lvlm-decode models --json"),
    "doctor": ("lvlm-decode doctor",),
    "generate": (
        "lvlm-decode generate scene:12",
        "lvlm-decode generate scene:12 --method 'vcd(alpha=0.5)' --method pai",
        "lvlm-decode generate photo.jpg --model llava-hf/llava-1.5-7b-hf",
    ),
    "explain": ("lvlm-decode explain scene:12 --method vcd --page why.html",),
    "export-hub": ("lvlm-decode export-hub 'vcd(alpha=0.5)' my-vcd",),
    "serve": (
        "lvlm-decode serve --method vcd",
        "lvlm-decode serve --model llava-hf/llava-1.5-7b-hf --method vcd+icd",
    ),
    "eval": (
        "lvlm-decode eval pope --method vcd --limit 100 --out runs",
        "lvlm-decode eval chair --protocol opera-64 --method vcd --out opera",
        "lvlm-decode eval pope --questions coco_pope.json --images val2014",
    ),
    "score": ("lvlm-decode score runs", "lvlm-decode score pope answers.jsonl --rule pope-official"),
    "table": (
        "lvlm-decode table runs --html",
        "lvlm-decode table runs --format latex",
        "lvlm-decode table --list",
        "lvlm-decode table pope-vcd-llava-1.5 --model tiny",
    ),
    "reproduce": ("lvlm-decode reproduce pope-vcd-llava-1.5 --model tiny --hours 0.5",),
    "bench methods": (
        "lvlm-decode bench methods --method vcd --method pai --output record.json",
        "lvlm-decode bench methods --model random --batch 1 --output random.json",
    ),
    "bench questions": ("lvlm-decode bench questions --method vcd --batch 16",),
    "bench speculative": ("lvlm-decode bench speculative --method vcd --drafter vispec",),
    "train draft-head": ("lvlm-decode train draft-head --target tiny --output head",),
    "train negatives": ("lvlm-decode train negatives --model tiny --output negatives",),
    "train vector": (
        "lvlm-decode train vector --kind vti",
        "lvlm-decode generate scene:12 --method 'vti(vectors=vti.safetensors)'",
    ),
    "data get": ("lvlm-decode data get pope coco --images",),
    "data verify": ("lvlm-decode data verify pope",),
    "data objects": ("lvlm-decode data objects objects.json --vocabulary words.txt",),
    "data prompts": ("lvlm-decode data prompts mmhal answers.jsonl prompts.jsonl",),
}

EXIT_STATUS = """\
\b
Exit status:
  0    finished
  1    an error, in one sentence on stderr
  2    a command line that cannot be read
  3    finished, but some questions failed, have no answer, or were edited
  130  stopped with Ctrl-C"""

OVERVIEW = """\
Decoding that keeps vision-language models from inventing what is not there.

  lvlm-decode demo                      a small model hallucinates (2 minutes)
  lvlm-decode generate scene:12         one picture: plain beside a method
  lvlm-decode explain scene:12          why, token by token, as a page
  lvlm-decode methods                   every method in one line
  lvlm-decode models                    model families with hub ids
  lvlm-decode eval pope --limit 100     a benchmark, with matched controls
  lvlm-decode table runs                the table of what eval wrote
  lvlm-decode score pope answers.jsonl  answers that were made elsewhere
  lvlm-decode serve                     the API of OpenAI's clients
  lvlm-decode doctor                    versions, devices and a self-check

lvlm-decode --help lists all commands.
lvlm-decode COMMAND --help shows its options and examples."""


def epilog(command: str) -> str | None:
    """The examples of a command as click prints them below its options."""
    lines = EXAMPLES.get(command)
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None
