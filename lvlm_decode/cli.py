"""``lvlm-decode``: demo, methods, doctor, generate, explain, eval, score, table, bench, train."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_decode_evals.commands import add_to, one_sentence, pairs

app = typer.Typer(
    help="Decoding that keeps vision-language models from inventing what is not in the image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@one_sentence
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
) -> None:
    """Every method: its paper, parameters and defaults, what it costs, what it cannot do; read off the code."""
    from .catalogue import broken, markdown
    from .catalogue import methods as described

    if as_markdown:
        typer.echo(markdown())
        return

    found = described()
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    from rich.console import Console
    from rich.markup import escape

    # Files and pipes get whole lines; a terminal gets its own width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for method in found:
        link = f"  arXiv {method['arxiv']}" if method["arxiv"] else ""
        package = f"  from package {method['package']}" if method["package"] else ""
        console.print(f"[bold]{method['name']}[/]  {escape(method['paper'])}{link}{package}")
        console.print(f"    {escape(method['summary'])}")
        for parameter in method["parameters"]:
            said = f"  {parameter['description']}" if parameter["description"] else ""
            console.print(f"    [cyan]{parameter['name']}[/] = {escape(repr(parameter['default']))}{escape(said)}")
        console.print(f"    costs {escape(method['cost'])}; runs with {', '.join(method['supports'])}")
        for mode, why in method["refuses"].items():
            console.print(f"    not with {mode}: {escape(why)}")
        console.print()
    for why in broken().values():
        typer.echo(f"warning: {why}", err=True)


@app.command()
@one_sentence
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions, devices and missing extras, and run the engine's self-check; exit status 1 when it fails."""
    from .doctor import examine, text

    report = examine()
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else text(report))
    if report.trouble:
        raise typer.Exit(1)


@app.command()
@one_sentence
def generate(
    image: Annotated[Path, typer.Argument(help="A picture; or scene:N, the N-th emoji scene that ships.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Please describe this image in detail.",
    method: Annotated[
        list[str] | None, typer.Option(help="vcd, ritual, vcd+ritual, vcd(alpha=0.5); may repeat.")
    ] = None,
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    param: Annotated[
        list[str] | None, typer.Option(help="name=value for every method that has it; may repeat.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 96,
    do_sample: Annotated[bool, typer.Option(help="Draw instead of taking the best token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampling.")] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams.")] = 1,
    seed: Annotated[int, typer.Option(help="Of views and draws.")] = 0,
    drafter: Annotated[str | None, typer.Option(help="Proposes tokens that the mitigated model verifies.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per method.")] = False,
) -> None:
    """Answer one question about one picture, with one or several methods."""
    import torch

    import lvlm_decode
    from lvlm_decode_evals.base import Question
    from lvlm_decode_evals.loaders import folder_images
    from lvlm_decode_evals.runner import Options, load, prompt_of

    from .methods import parse

    chosen = [parse(name, **pairs(param, "--param")) for name in (method or ["plain"])]
    path = scene_path(str(image))
    picture = folder_images(path.parent, allow_outside=True, turn=True).open(path.name)
    loaded = load(model, dtype=dtype)
    text = prompt_of(loaded.processor, Question("", prompt, path.name), Options())
    inputs = loaded.processor(images=[picture], text=[text], return_tensors="pt").to(loaded.model.device)
    sampling: dict[str, Any] = {"do_sample": do_sample, "num_beams": num_beams}
    if do_sample:
        sampling["temperature"] = temperature
    for name, one in zip(method or ["plain"], chosen):
        lvlm_decode.attach(loaded.model, one, processor=loaded.processor, drafter=drafter)
        try:
            keyed = {} if do_sample and num_beams > 1 else {"seed": seed}
            torch.manual_seed(seed)
            out = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling, **keyed)
        finally:
            lvlm_decode.detach(loaded.model)
        new = out[0, inputs["input_ids"].shape[1] :]
        answer = loaded.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        if as_json:
            typer.echo(json.dumps({"method": name, "answer": answer, "tokens": len(new), "seed": seed}))
        else:
            typer.echo(f"{name}: {answer}")


@app.command()
@one_sentence
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
    loaded = load(model, dtype=dtype)
    told = explained(
        loaded.model,
        loaded.processor,
        scene_path(str(image)),
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


def scene_path(image: str) -> Path:
    """The file of ``scene:N``, or the path itself."""
    from .errors import InputError

    if not image.startswith("scene:"):
        return Path(image)
    import lvlm_decode_data

    scenes, number = lvlm_decode_data.load_scenes(), image.removeprefix("scene:")
    if not number.isdigit() or int(number) >= len(scenes):
        raise InputError(f"there is no {image}; scenes are scene:0 to scene:{len(scenes) - 1}.")
    return scenes[int(number)].path


@app.command()
@one_sentence
def demo(
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    page: Annotated[Path, typer.Option(help="The page it writes, pictures included.")] = Path("lvlm-decode-demo.html"),
    images: Annotated[int, typer.Option(min=2, help="Scenes of the POPE table; six questions each.")] = 32,
    seed: Annotated[int, typer.Option(help="Of views and draws.")] = 0,
) -> None:
    """See a LLaVA hallucinate, and what VCD and RITUAL change: a POPE table, captions, time per token, and a page."""
    from .demo import run

    run(model, page, images, seed)


add_to(app)


def _mount() -> None:
    from .speculative.commands import bench
    from .training.commands import app as train

    app.add_typer(bench, name="bench")
    app.add_typer(train, name="train")


_mount()


def main() -> None:
    """Entry point of the ``lvlm-decode`` command."""
    app(prog_name="lvlm-decode")


if __name__ == "__main__":
    main()
