"""`lvlm-decode data get | verify | objects | prompts`: other people's files, and what is made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_decode.errors import EvalError, SettingsError

from .commands import OptionList, evaluator_from, one_sentence
from .upstream import DATASETS, NOTES

data_app = typer.Typer(no_args_is_help=True, help="Benchmarks' own files: fetch, verify, prepare.")

Folder = Annotated[Path | None, typer.Option("--to", help="Folder of the data sets; default $LVLM_DECODE_DATA.")]
Named = Annotated[list[str] | None, typer.Argument(help=f"Data sets: {', '.join(DATASETS)}.")]


@data_app.command("get")
@one_sentence
def get_command(
    datasets: Named = None,
    to: Folder = None,
    images: Annotated[bool, typer.Option("--images", help="COCO's images as well (6 GB).")] = False,
    mirror: Annotated[
        str | None, typer.Option(help="Fetch DATASET/FILE from here instead: an address or a folder.")
    ] = None,
) -> None:
    """Fetch data sets from their owners, showing licences, and verify checksums.

    Offline it says exactly which file to put where. Files that are there are verified, never overwritten.
    """
    from .download import data_folder, get

    if not datasets:
        raise SettingsError(f"data get needs the name of a data set: {', '.join(DATASETS)}.")
    try:
        for found in get(datasets, to or data_folder(), mirror=mirror, with_images=images, tell=typer.echo):
            typer.echo(found.sentence())
    finally:
        for name in dict.fromkeys(datasets):
            if name in NOTES:
                typer.echo(NOTES[name])


@data_app.command("verify")
@one_sentence
def verify_command(
    what: Annotated[list[str] | None, typer.Argument(help="Data sets, or any files; default: all data sets.")] = None,
    to: Folder = None,
) -> None:
    """Compare files with their pinned checksums; a file given by its path is recognised by its content.

    Exit status 1 when a file is other than pinned, or when none is there.
    """
    from .download import check, data_folder, identify, wanted

    files = [name for name in what or () if name not in DATASETS and Path(name).exists()]
    for name in files:
        source = identify(Path(name))
        known = f"{source.dataset}/{source.name} ({source.what}; {source.licence})" if source else "no pinned file"
        typer.echo(f"{name}: {known}")
    names = [name for name in what or () if name not in files]
    if files and not names:
        return
    folder = to or data_folder()
    found = [check(source, folder) for source in wanted(names, with_images=True)]
    for entry in found:
        typer.echo(entry.sentence())
    wrong = [entry for entry in found if entry.state == "wrong"]
    if wrong:
        raise EvalError(f"{len(wrong)} of {len(found)} files are other than pinned; see above.")
    if all(entry.state == "missing" for entry in found):
        raise EvalError(
            f"{folder} has none of these files; run `lvlm-decode data get`, or give their folder with --to."
        )


@data_app.command("objects")
@one_sentence
def objects_command(
    out: Annotated[Path, typer.Argument(help="JSON file to write: image id -> objects.")],
    vocabulary: Annotated[Path, typer.Option(help="Synonym table.")],
    instances: Annotated[list[Path] | None, typer.Option(help="COCO instances_*.json; may repeat.")] = None,
    captions: Annotated[list[Path] | None, typer.Option(help="COCO captions_*.json; may repeat.")] = None,
    parser: Annotated[
        str, typer.Option(help="Word parser: pattern or wordnet-pos, the one that will score.")
    ] = "pattern",
) -> None:
    """Write what each COCO image contains, for `score chair --objects`: annotated instances and captioned objects."""
    from .answers import write_json
    from .chair import build_objects, vocabulary_file

    if not instances and not captions:
        raise SettingsError("data objects needs --instances or --captions, COCO's annotation files.")
    table = build_objects(instances or [], captions or [], vocabulary_file(vocabulary), parser)
    write_json(out, table)
    pairs = sum(map(len, table.values()))
    typer.echo(f"wrote {out}: {len(table)} images, {pairs} objects")


@data_app.command("prompts")
@one_sentence
def prompts_command(
    benchmark: Annotated[str, typer.Argument(help="Benchmark: mmhal or vallu.")],
    answers: Annotated[Path, typer.Argument(help="File of answers.")],
    out: Annotated[Path, typer.Argument(help="JSON lines to write: id, prompt, image.")],
    option: OptionList = None,
) -> None:
    """Write what to ask a judge about answers. Have each answered and write lines of `id` and `reply`; then
    `lvlm-decode score BENCHMARK ANSWERS -o judge=REPLIES`.
    """
    from .judges import Judged, write_prompts

    chosen = evaluator_from(benchmark, option)
    if not isinstance(chosen, Judged):
        raise SettingsError(f"{benchmark} needs no judge; score its answers directly.")
    prompts = chosen.prompts(chosen.read_answers(answers))
    write_prompts(out, prompts)
    typer.echo(f"wrote {out}: {len(prompts)} prompts")
