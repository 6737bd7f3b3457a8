"""``lvlm-decode``: demo, methods, models, doctor, generate, explain, export-hub, serve, eval, score, table, reproduce, data,
bench, train.

Imports no torch before a command needs it: ``--help`` and ``score`` answer at once.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_decode_evals.commands import one_sentence, pairs

from . import __version__
from .examples import EXIT_STATUS, OVERVIEW, epilog

app = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lvlm-decode {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=EXIT_STATUS)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Decoding that keeps vision-language models from inventing what is not in the image."""
    if context.invoked_subcommand is None:
        typer.echo(OVERVIEW)


def keeps_nothing(command: Callable) -> Callable:
    """Ctrl-C ends the command with exit status 130 and says that nothing was kept."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("Stopped; nothing was written.", err=True)
            raise typer.Exit(130) from None

    return guarded


@app.command()
@one_sentence
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show only this method, with its parameters, cost and limits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the methods by kind in one line each, or show one with its paper, parameters, cost and limits."""
    from .catalogue import KINDS, broken, by_kind, describe, markdown
    from .catalogue import methods as described

    if as_markdown:
        typer.echo(markdown())
        return
    found = [describe(name)] if name else described()
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    elif name:
        typer.echo(_whole(found[0]))
    else:
        for kind, group in by_kind(found).items():
            typer.echo(f"{kind}: {KINDS[kind]}" if kind in KINDS else kind)
            for method in group:
                package = f" (from package {method['package']})" if method["package"] else ""
                typer.echo(wrapped(f"{method['name']:<9} {method['summary']}{package}", 10))
            typer.echo()
        typer.echo("lvlm-decode methods NAME shows the parameters, cost and limits of one.")
    for why in broken().values():
        typer.echo(f"warning: {why}", err=True)


def _whole(method: dict[str, Any]) -> str:
    """One method with everything that is known about it."""
    link = f", arXiv {method['arxiv']}" if method["arxiv"] else ""
    lines = [f"{method['name']}: {method['summary']}", "", f"Paper: {method['paper']}{link}"]
    if method["package"]:
        lines.append(f"Package: {method['package']}")
    lines.append(f"Cost beside plain decoding: {method['cost']}")
    if method["needs"]:
        lines.append(f"Needs a model with: {', '.join(method['needs'])}")
    lines.append(f"Runs with: {', '.join(method['supports'])}")
    lines += [f"Not with {mode}: {why}" for mode, why in method["refuses"].items()]
    if method["parameters"]:
        lines += ["", "Parameters:"]
        lines += [
            f"  {p['name']} {'(required)' if p['required'] else '= ' + repr(p['default'])}  {p['description']}"
            for p in method["parameters"]
        ]
    if method["aliases"]:
        lines += ["", "The authors' names work too: " + ", ".join(f"{a} for {n}" for a, n in method["aliases"].items())]
    return "\n".join(wrapped(line, 6) for line in lines)


def wrapped(line: str, indent: int) -> str:
    """``line`` folded to the terminal's width; files and pipes get whole lines."""
    if not sys.stdout.isatty():
        return line
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)


@app.command()
@one_sentence
def models(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """List the model families with hub ids, and the small models that ship."""
    from .checkpoints import CHECKPOINTS
    from .plugins import plugins

    if as_json:
        typer.echo(json.dumps(CHECKPOINTS, indent=2))
        return
    for kind, ids in CHECKPOINTS.items():
        for number, hub_id in enumerate(ids):
            typer.echo(f"{'' if number else kind:<18}{hub_id}")
    for plugin in plugins("lvlm_decode.families", frozenset(CHECKPOINTS)).values():
        typer.echo(f"{plugin.name:<18}(package {plugin.package})")
    typer.echo("\ntiny and tiny-instructblip are the small models that ship; they know emoji scenes only.")


@app.command()
@one_sentence
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions, devices and missing extras, and run the engine's self-check; exit status 1 when it fails."""
    from .doctor import examine, text

    report = examine()
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else text(report))
    if report.trouble:
        raise typer.Exit(1)


Temperature = Annotated[float | None, typer.Option(min=0.01, help="Sampling temperature; needs --do-sample.")]


@app.command()
@one_sentence
@keeps_nothing
def generate(
    image: Annotated[Path, typer.Argument(help="A picture; scene:N is the N-th emoji scene that ships.")],
    prompt: Annotated[
        str, typer.Option(help="Question or request about the picture.")
    ] = "Please describe this image in detail.",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method, for example vcd, 'vcd(alpha=0.5)' or vcd+ritual; may repeat. Default: vcd."),
    ] = None,
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", help="Parameter of every method that has it, name=value; may repeat."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of the answer in tokens.")] = 96,
    do_sample: Annotated[bool, typer.Option(help="Sample tokens instead of taking the most probable one.")] = False,
    temperature: Temperature = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Number of beams.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of views and sampling.")] = 0,
    drafter: Annotated[str | None, typer.Option(help="Drafter of speculative decoding, for example vispec.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per method that was named, without plain beside it.")
    ] = False,
) -> None:
    """Answer one question about one picture, plain decoding beside one or several methods.

    About an emoji scene the truth is known: absent objects are marked, and false numbers and places in a second colour.
    """
    import lvlm_decode_data
    from lvlm_decode_evals.loaders import folder_images

    from .errors import InputError

    if temperature is not None and not do_sample:
        raise InputError("--temperature needs --do-sample; without it the most probable token is taken.")
    scene = scene_of(str(image))
    path = scene.path if scene else local(image)
    picture = folder_images(path.parent, allow_outside=True, turn=True).open(path.name)
    if scene is None and lvlm_decode_data.is_tiny(model):
        typer.echo(
            f"note: {model} is a toy model trained on emoji scenes, so what it says about a photograph means nothing; "
            "give a real model, for example --model llava-hf/llava-1.5-7b-hf.",
            err=True,
        )
    import torch

    import lvlm_decode
    from lvlm_decode_evals.base import Question
    from lvlm_decode_evals.runner import Options, load, prompt_of

    from .methods import parse

    names = list(dict.fromkeys(method or ["vcd"]))
    given = pairs(param, "--param")
    chosen = {name: parse(name, **given) for name in names}
    if not as_json:
        chosen = {"plain": parse("plain"), **chosen}
    loaded = load(model, dtype=dtype)
    text = prompt_of(loaded.processor, Question("", prompt, path.name), Options())
    inputs = loaded.processor(images=[picture], text=[text], return_tensors="pt").to(loaded.model.device)
    sampling: dict[str, Any] = {"do_sample": do_sample, "num_beams": num_beams}
    if do_sample:
        sampling["temperature"] = 1.0 if temperature is None else temperature
    answers: dict[str, str] = {}
    for name, one in chosen.items():
        lvlm_decode.attach(loaded.model, one, processor=loaded.processor, drafter=drafter)
        try:
            keyed = {} if do_sample and num_beams > 1 else {"seed": seed}
            torch.manual_seed(seed)
            out = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling, **keyed)
        finally:
            lvlm_decode.detach(loaded.model)
        new = out[0, inputs["input_ids"].shape[1] :]
        answers[name] = loaded.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        if as_json:
            typer.echo(json.dumps({"method": name, "answer": answers[name], "tokens": len(new), "seed": seed}))
    if not as_json:
        show(answers, scene)


@app.command()
@one_sentence
@keeps_nothing
def explain(
    image: Annotated[Path, typer.Argument(help="A picture, or scene:N, the N-th emoji scene that ships.")],
    prompt: Annotated[str, typer.Option(help="The question to ask.")] = "Please describe this image in detail.",
    method: Annotated[str, typer.Option(help="A method: vcd, vcd+ritual, vcd(alpha=0.5).")] = "vcd",
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    param: Annotated[list[str] | None, typer.Option(help="A parameter of the method, name=value; may repeat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens at most.")] = 64,
    top: Annotated[int, typer.Option(min=1, help="Number of candidates kept per token and distribution.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the views.")] = 0,
    drafter: Annotated[str | None, typer.Option(help="Drafter of speculative decoding.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    page: Annotated[Path, typer.Option(help="The page that is written.")] = Path("lvlm-decode-explain.html"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as one JSON object; write no page.")
    ] = False,
) -> None:
    """Show why a method gave an answer: candidates of every view, the mask, what differs from plain decoding, and a page."""
    from lvlm_decode_evals.runner import load

    from .evidence.explain import explain as explained
    from .methods import parse

    chosen = parse(method, **pairs(param, "--param"))
    scene = scene_of(str(image))
    loaded = load(model, dtype=dtype)
    told = explained(
        loaded.model,
        loaded.processor,
        scene.path if scene else local(image),
        prompt,
        chosen,
        drafter=drafter,
        seed=seed,
        max_new_tokens=max_new_tokens,
        top=top,
    )
    if as_json:
        typer.echo(json.dumps(told.to_dict()))
        return
    typer.echo(told.answer)
    for token in told.changed:
        typer.echo(f"  token {token.index + 1}: {token.text.strip()!r} instead of {token.plain_text.strip()!r}")
    if not told.changed:
        typer.echo("  No token differs from what plain decoding takes after the same words.")
    typer.echo(f"wrote {told.save(page)}", err=True)


@app.command("export-hub")
@one_sentence
def export_hub(
    method: Annotated[str, typer.Argument(help="A method: vcd, vcd+ritual, vcd(alpha=0.5).")],
    folder: Annotated[Path, typer.Argument(help="The folder that is written.")],
) -> None:
    """Write a repository that generate(custom_generate=FOLDER, trust_remote_code=True) runs: code, card, settings."""
    from .hub import export
    from .methods import parse

    export(parse(method), folder)
    typer.echo(f"wrote {folder}", err=True)


def show(answers: dict[str, str], scene: Any) -> None:
    """Answers beside one another on a terminal, below one another in a file; what a scene contradicts in brackets."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .marks import STYLES, bracketed

    texts: dict[str, Text] = {}
    for name, answer in answers.items():
        texts[name] = Text()
        for piece in _marked(answer, scene):
            texts[name].append(bracketed([piece]), style=STYLES[piece[1]])
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if console.is_terminal and console.width >= 26 * len(texts):
        table = Table(*texts, expand=True)
        table.add_row(*texts.values())
        console.print(table)
    else:
        for name, text in texts.items():
            console.print(Text(f"{name}: ") + text)
    if scene is not None:
        counted = ", ".join(f"{name} ({count})" for name, count in sorted(scene.counts.items()))
        console.print(
            f"In the picture: {counted}. Marked: [absent objects], {{false numbers and places}}.", markup=False
        )


def _marked(answer: str, scene: Any) -> Sequence[tuple[str, str]]:
    """``answer`` in pieces with their kinds; without a scene nothing is known to be wrong."""
    if scene is None:
        return [(answer, "")]
    from lvlm_decode_evals import evaluator
    from lvlm_decode_evals.base import Answer
    from lvlm_decode_evals.loaders import scene_source

    from .marks import pieces

    chair = evaluator("chair")
    (question,) = scene_source(chair, [scene]).splits["captions"]
    return pieces(answer, scene, chair.row(Answer.to(question, answer)).evidence["hallucinated"])


def local(image: Path) -> Path:
    """A picture's path.

    Raises:
        InputError: it is an address, or a folder.
    """
    from .errors import InputError

    if "://" in str(image) or str(image).startswith(("http:", "https:")):
        raise InputError(f"{image} is an address, and pictures are read from files only; download it first.")
    if image.is_dir():
        raise InputError(f"{image} is a folder; name one picture in it.")
    return image


def scene_of(image: str) -> Any:
    """The scene of ``scene:N``; None for anything else."""
    from .errors import InputError

    if not image.startswith("scene:"):
        return None
    import lvlm_decode_data

    scenes, number = lvlm_decode_data.load_scenes(), image.removeprefix("scene:")
    if not number.isdigit() or int(number) >= len(scenes):
        raise InputError(f"there is no {image}; scenes are scene:0 to scene:{len(scenes) - 1}.")
    return scenes[int(number)]


@app.command()
@one_sentence
@keeps_nothing
def demo(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    page: Annotated[Path, typer.Option(help="HTML page to write, pictures included.")] = Path("lvlm-decode-demo.html"),
    images: Annotated[int, typer.Option(min=2, help="Number of scenes in the POPE table, six questions each.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of views and sampling.")] = 0,
) -> None:
    """Show how a small LLaVA hallucinates and what VCD and RITUAL change: a POPE table, captions, times, and a page."""
    from .demo import run

    if page.is_dir() or not page.parent.is_dir():
        from .errors import InputError

        raise InputError(f"{page} cannot be written: it is a folder, or lies in none; give the page another name.")
    typer.echo("The demo takes about two minutes on two cores; a progress line follows each step.", err=True)
    run(model, page, images, seed)


def _mount() -> None:
    from lvlm_decode_evals.commands import add_to

    from .bench.commands import bench
    from .serving.command import serve
    from .training.commands import app as train

    app.command()(serve)
    add_to(app)
    app.add_typer(bench, name="bench")
    app.add_typer(train, name="train")
    for command in app.registered_commands:
        command.epilog = epilog(command.name or str(getattr(command.callback, "__name__", "")))
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands if group.typer_instance else ():
            command.epilog = epilog(f"{group.name} {command.name}")


_mount()


def main() -> None:
    """Entry point of the ``lvlm-decode`` command."""
    app(prog_name="lvlm-decode")


if __name__ == "__main__":
    main()
