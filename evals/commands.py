"""`lvlm-decode eval | score | table | reproduce | data`: what the command line does with evaluators. torch is imported by eval
alone.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_decode.errors import EvalError, LvlmDecodeError, SettingsError, UnknownNameError
from lvlm_decode.reading import parse_yaml

from . import EVALUATORS, evaluator
from .base import Evaluator
from .metrics import REPLICATES
from .parsers import RULES

if TYPE_CHECKING:
    from .plan import Result
    from .tables import Block

# Exit status of a run, score or table that finished, but not over all questions as they were asked and answered.
FINISHED_WITH_FAILURES = 3


def one_sentence(command: Callable) -> Callable:
    """Errors this project raises on purpose become one line on stderr and exit status 1."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LvlmDecodeError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.filename or 'a file'} cannot be used ({error.strerror or error})."
        except KeyboardInterrupt:
            typer.echo("Stopped; the same command continues where this one was.", err=True)
            raise typer.Exit(130) from None
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1)

    return guarded


def pairs(given: Sequence[str] | None, option: str) -> dict[str, Any]:
    """{"alpha": 0.5} from ["alpha=0.5"]; values are read as YAML."""
    found: dict[str, Any] = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise SettingsError(f"{option} is {item!r}; write {option} name=value.")
        found[name.strip()] = parse_yaml(value, f"{option} {item}")[0]
    return found


def evaluator_from(name: str, given: Sequence[str] | None, **shortcuts: Any) -> Evaluator:
    """An evaluator with the options of the command line; `shortcuts` that are None were not given."""
    return evaluator(name, **_options(given, **shortcuts))


def _options(given: Sequence[str] | None, **shortcuts: Any) -> dict[str, Any]:
    options = pairs(given, "--option") | {key: value for key, value in shortcuts.items() if value is not None}
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


Rule = Annotated[str | None, typer.Option(help=f"Rule that reads yes or no out of an answer: {', '.join(RULES)}.")]
Parser = Annotated[str | None, typer.Option(help="Word parser of CHAIR: pattern or wordnet-pos.")]
Objects = Annotated[Path | None, typer.Option(help="For chair: JSON file, from image id to object names.")]
Vocabulary = Annotated[Path | None, typer.Option(help="For chair: file of the synonym table.")]
OptionList = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        help="Other option of the benchmark, name=value; may repeat. An unknown name is answered with the known ones.",
    ),
]


@one_sentence
def eval_command(
    benchmark: Annotated[str, typer.Argument(help=f"Benchmark: {', '.join(sorted(EVALUATORS))}.")],
    model: Annotated[str, typer.Option(help="tiny, tiny-instructblip, a folder, or a hub id.")] = "tiny",
    method: Annotated[
        list[str] | None, typer.Option(help="Method, for example vcd, 'vcd(alpha=0.5)' or vcd+ritual; may repeat.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="What answers: transformers, vllm, or the address of a server that speaks OpenAI's chat API; --model is then "
            "the name it serves."
        ),
    ] = "transformers",
    out: Annotated[Path, typer.Option(help="Folder of the answers; the same folder continues a run.")] = Path("runs"),
    seed: Annotated[list[int] | None, typer.Option(help="Seed of views and sampling; may repeat. Default: 0.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Only these splits; may repeat.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions of each split.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Answer only share i of n, written i/n; the last share to finish merges all.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Number of questions per batch, or in flight; auto takes as many as fit in memory.")
    ] = "16",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Device map of transformers; auto spreads a large model over several GPUs.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images that the questions name.")] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Read images that names or links lead to outside --images.")
    ] = False,
    questions: Annotated[
        str | None, typer.Option(help="Question file or folder of the real benchmark, or hub:NAME.")
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--no-do-sample", help="Sample tokens. Default: sample where the method can."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling: smallest set of tokens with this total probability.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among the k most probable tokens. Default: all tokens.")
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="Number of beams.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum length of an answer in tokens. Default: the benchmark's.")
    ] = None,
    suffix: Annotated[str, typer.Option(help="Text to put after every question, leading blank included.")] = "",
    template: Annotated[
        str | None, typer.Option(help="Whole prompt around {question}. Default: the model's chat template.")
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Drafter of speculative decoding, for example vispec.")] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="Parameter of every method that has it, name=value.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Ask as a published evaluation did: a name of configs/protocols/, e.g. opera-64.")
    ] = None,
    times: Annotated[bool, typer.Option("--times", help="Also record how long every batch took, for tables.")] = False,
    option: OptionList = None,
    rule: Rule = None,
    parser: Parser = None,
    objects: Objects = None,
    vocabulary: Vocabulary = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Control to leave out, for example mask or 'plain sample'; may repeat.")
    ] = None,
) -> None:
    """Ask a model the questions of a benchmark with one or several methods; matched controls run too.

    Killed at any moment and started again with the same options it continues, and ends with the same files. Without
    --questions it asks about the emoji scenes that ship with the project. Exit status 3: finished, but some questions
    could not be asked (a missing or corrupt image); they are named.
    """
    from .loaders import check_limit, protocol_source

    # Before torch is imported, which takes seconds.
    check_limit(limit)
    from .api import Evaluation, prepare
    from .plan import GREEDY, Decoding, check_seeds
    from .runner import Options, Share, failures, load, processes
    from .tables import render

    shown = None
    decided: Mapping[str, Any] = {}
    if protocol is not None:
        from .configs import is_tiny
        from .protocols import protocol as protocol_named
        from .protocols import setup

        given = {**pairs(option, "--option"), "rule": rule, "parser": parser, "--seed": seed}
        given |= {"--max-new-tokens": max_new_tokens}
        given |= {"--suffix": suffix or None, "--template": template, "--questions": questions}
        given |= {"--do-sample": do_sample, "--temperature": temperature, "--top-p": top_p, "--top-k": top_k}
        shown = protocol_named(protocol)
        fixed = setup(shown, benchmark, model, is_tiny(model), given | {"--num-beams": num_beams, "--dtype": dtype})
        dtype = dtype or fixed.dtype
        decided = fixed.options
        max_new_tokens, suffix, template, seed = (
            fixed.max_new_tokens,
            fixed.suffix,
            fixed.template,
            list(fixed.seeds) or seed,
        )
    shortcuts = {"rule": rule, "parser": parser, "objects": objects, "vocabulary": vocabulary}
    chosen = evaluator_from(benchmark, option, **(shortcuts | dict(decided)))
    size = int(batch_size) if batch_size.isdecimal() else batch_size
    options = Options(max_new_tokens, suffix, template, drafter, size, pairs(param, "--param"), times)
    share, state = processes()
    if shard is not None:
        if state is not None:
            raise SettingsError("--shard and accelerate both divide the questions; use one of them.")
        share = Share.parse(shard)
        if size == "auto":
            raise SettingsError(
                "--batch-size auto may differ between shards, which then cut other batches; give a number."
            )

    check_seeds(seed or [0])
    wanted = None
    sampling = (temperature, top_p, top_k)
    if do_sample is False and any(value is not None for value in sampling):
        raise SettingsError("--temperature, --top-p and --top-k need sampling; leave out --no-do-sample.")
    if do_sample is not None or num_beams is not None or any(value is not None for value in sampling):
        drawn = do_sample if do_sample is not None else any(value is not None for value in sampling)
        wanted = Decoding(
            drawn, 1.0 if temperature is None else temperature, top_p, top_k, 1 if num_beams is None else num_beams
        )
    if shown is not None and shown.decoding is not None:
        wanted = shown.decoding
    elif shown is not None and wanted is None:
        wanted = GREEDY
        typer.echo(
            f"warning: protocol {shown.name} leaves decoding to the rows of its table; these answers are greedy, unless "
            "--num-beams or --do-sample is given.",
            err=True,
        )
    source, label = None, None
    if shown is not None:
        source = None if is_tiny(model) else protocol_source(shown, chosen, images)
        label = f"{shown.name} on emoji scenes" if source is None else shown.label(chosen)
        if source is not None and shown.checkpoints and shown.checkpoint(model) is None:
            typer.echo(
                f"warning: protocol {shown.name} was run on {', '.join(shown.checkpoints)}; {model} is another model, and is "
                "asked in its own template.",
                err=True,
            )
        if label != shown.name and source is not None:
            typer.echo(f"warning: the answers are of protocol {label}; its own is {shown.ground_truth}.", err=True)
    prepared = prepare(
        chosen,
        methods=method or ["plain"],
        decoding=wanted,
        parameters=options.parameters,
        without=without or (),
        source=source,
        questions=questions,
        images=images,
        allow_outside=allow_outside,
        splits=split,
        limit=limit,
        out=out,
    )
    loaded: Any
    if engine == "transformers":
        device = None if state is None else state.device
        loaded = load(model, dtype=dtype, device=device, device_map=device_map)
    else:
        from .engines import engine_of

        if state is not None or device_map is not None:
            raise SettingsError(
                f"accelerate and --device-map spread models of transformers; leave them out with {engine}."
            )
        loaded = engine_of(engine, model, dtype)
    run = prepared.run(
        loaded,
        out,
        seeds=seed or [0],
        options=options,
        share=share,
        state=state,
        protocol=label,
        tell=functools.partial(typer.echo, err=True),
    )
    results = run.execute()
    if not results:
        if run.main:
            typer.echo(f"Share {shard} is done; the table comes with the last share.")
        return
    show(render(Evaluation(results).blocks()))
    if bad := failures(results):
        typer.echo(f"{bad} questions have no answer; they are named above and in summary.json.", err=True)
        raise typer.Exit(FINISHED_WITH_FAILURES)


@one_sentence
def score_command(
    target: Annotated[list[str], typer.Argument(help="A run's folder; or a benchmark and a file of answers.")],
    rule: Rule = None,
    parser: Parser = None,
    objects: Objects = None,
    vocabulary: Vocabulary = None,
    questions: Annotated[
        Path | None, typer.Option(help="File of the questions: brings labels, and finds missing and unknown ids.")
    ] = None,
    option: OptionList = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    rows: Annotated[Path | None, typer.Option(help="Also write the scored rows with their evidence here.")] = None,
) -> None:
    """Score answers, without a model: of a run (score DIR), or made elsewhere (score pope FILE).

    Exit status 3: scored, but some questions failed or have no answer, labels contradict each other, or a run's files are
    not as the run wrote them; each is named.
    """
    from .api import check_file, read_run, score

    shortcuts = {"rule": rule, "parser": parser, "objects": objects, "vocabulary": vocabulary}
    if rows is not None:
        check_file(rows)
        for read in (*target[1:], questions, objects, vocabulary):
            if read is not None and rows.exists() and Path(read).exists() and rows.samefile(read):
                raise SettingsError(f"--rows {rows} would overwrite a file that is read; give another name.")
    if len(target) == 1:
        if rows is not None or questions is not None:
            raise SettingsError("--rows and --questions are for a file of answers; a run's folder has both in it.")
        if target[0] in EVALUATORS and not Path(target[0]).exists():
            raise SettingsError(f"score {target[0]} needs a file of answers: lvlm-decode score {target[0]} FILE.")
        results = read_run(target[0], write=True, **_options(option, **shortcuts)).results
        if as_json:
            typer.echo(json.dumps([_record(result) for result in results], indent=1))
        for result in results:
            if not as_json:
                typer.echo(f"{result.name}: {_line(result.evaluator, result.rows)}")
            for sentence in result.audit.sentences():
                typer.echo(f"warning: {result.name}: {sentence}", err=True)
        if any(result.audit.incomplete for result in results):
            raise typer.Exit(FINISHED_WITH_FAILURES)
        return
    if len(target) != 2:
        raise SettingsError("score takes a run's folder, or a benchmark and a file: lvlm-decode score pope FILE.")
    found = score(evaluator_from(target[0], option, **shortcuts), target[1], questions)
    if rows is not None:
        found.write(rows)
    if as_json:
        typer.echo(json.dumps(found.report, indent=1))
    elif found.splits:
        for name, part in found.splits.items():
            typer.echo(f"{name}: {_line(part.evaluator, part.scored)}")
    else:
        typer.echo(_line(found.evaluator, found.scored))
    for sentence in found.problems:
        typer.echo(f"warning: {sentence}", err=True)
    if found.audit.incomplete:
        raise typer.Exit(FINISHED_WITH_FAILURES)


def _record(result: Any) -> dict[str, Any]:
    """One cell as `score DIR --json` prints it."""
    known = {"folder": str(result.folder), "model": (result.settings.get("model") or {}).get("name")}
    known |= {"method": result.method, "decoding": result.decoding.name, "split": result.split, "seed": result.seed}
    known |= result.evaluator.report(result.rows) if result.rows else {}
    return known | ({"problems": result.audit.counts()} if result.audit else {})


def _line(chosen: Evaluator, scored_rows: Sequence) -> str:
    """The columns of a summary in one line."""
    from .tables import Value

    if not scored_rows:
        return "no answer to score"
    summary = chosen.summary(scored_rows)
    shown = [(c, Value(summary[c.key], c.kind).text()) for c in chosen.columns if c.key in summary]
    return ", ".join(f"{c.title} {text}{'%' if c.kind == 'percent' else ''}" for c, text in shown)


def show(text: str) -> None:
    """Markdown as tables that fit the terminal; as it is where it goes to a file or a pipe."""
    if not sys.stdout.isatty():
        typer.echo(text, nl=False)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


@one_sentence
def table_command(
    target: Annotated[
        Path | None, typer.Argument(help="A run's folder, or the name or file of a paper's table.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the papers' tables by name.")] = False,
    format: Annotated[str, typer.Option(help="Format: markdown, csv or latex.")] = "markdown",
    plot: Annotated[Path | None, typer.Option(help="Also write pictures into this folder.")] = None,
    as_page: Annotated[
        bool,
        typer.Option("--html", help="Also write report.html into the run's folder: tables, pictures, all answers."),
    ] = False,
    replicates: Annotated[int, typer.Option(min=100, help="Bootstrap replicates.")] = REPLICATES,
    rule: Rule = None,
    parser: Parser = None,
    objects: Objects = None,
    vocabulary: Vocabulary = None,
    option: OptionList = None,
    model: Annotated[
        str | None, typer.Option(help="For a config: run on this model instead; tiny works offline.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="For a config: folder of its answers.")] = None,
    limit: Annotated[int | None, typer.Option(help="For a config: first N questions of each split.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images: for a config, and for the thumbnails of --html.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="For a config: question file or folder.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="For a config: only the first N of its seeds.")] = None,
    rerun: Annotated[bool, typer.Option("--run/--no-run", help="For a config: run rows that are missing.")] = True,
) -> None:
    """Print the tables of a run, every method beside its matched controls, or a paper's table beside its printed values.

    Without a target it needs --list.
    """
    from .api import Evaluation, check_folder, read_run
    from .tables import FORMATS, render

    if listed:
        from .configs import table_titles

        for name, title in table_titles().items():
            typer.echo(f"{name}  {title}" if not sys.stdout.isatty() else f"{name}\n    {title}")
        return
    if target is None:
        raise SettingsError("table needs a run's folder or a paper's table; lvlm-decode table --list shows those.")
    from .configs import table_path

    target = table_path(target)
    if plot is not None:
        check_folder(plot)
    if format not in FORMATS:
        raise UnknownNameError.of("table format", format, FORMATS)
    extra: list[Block] = []
    results: Sequence[Result]
    status = 0
    if target.suffix in (".yaml", ".yml"):
        from .configs import paper_blocks, read_config, run_config

        if any(value is not None for value in (rule, parser, objects, vocabulary, option)):
            raise SettingsError("a paper's table says itself how it is scored; leave out the options of scoring.")
        config = read_config(target)
        config, results = run_config(
            config,
            rerun=rerun,
            model=model,
            out=out,
            limit=limit,
            images=images,
            questions=questions,
            seeds=seeds,
        )
        extra = paper_blocks(config, results, model or str(config.model), replicates)
    else:
        given = _options(option, rule=rule, parser=parser, objects=objects, vocabulary=vocabulary)
        results = read_run(target, **given).results
    if any(result.audit.incomplete for result in results):
        status = FINISHED_WITH_FAILURES
    unscored = [result for result in results if not result.rows]
    results = [result for result in results if result.rows]
    if not results:
        raise EvalError(f"{target} has no scored answer yet; start the evaluation again to finish it.")
    made = [*extra, *Evaluation(results, replicates).blocks()]
    text = render(made, format)
    if format == "markdown":
        show(text)
    else:
        typer.echo(text, nl=False)
    # What has no line in the table has no note below it either.
    for result in unscored:
        for sentence in result.audit.sentences():
            typer.echo(f"warning: {result.name}: {sentence}", err=True)
    if plot is not None:
        from .plots import write_pictures

        for path in write_pictures(results, plot, replicates):
            typer.echo(f"wrote {path}", err=True)
    if as_page:
        from . import report

        # OUT of OUT/evaluator/split/method/decoding/seed-N.
        folder = results[0].folder.parents[4] if target.is_file() else target
        title = f"{target.stem if target.is_file() else target.resolve().name}: what the methods answered"
        for sentence in report.write(
            folder / "report.html", results, made, title, images=images, replicates=replicates
        ):
            typer.echo(f"warning: {sentence}", err=True)
        typer.echo(f"wrote {folder / 'report.html'}", err=True)
    if status:
        raise typer.Exit(status)


def add_to(app: typer.Typer) -> None:
    """Mount the commands of this package on the command line's app."""
    from .data_commands import data_app
    from .reproduce import reproduce_command

    app.command("eval")(eval_command)
    app.command("score")(score_command)
    app.command("table")(table_command)
    app.command("reproduce")(reproduce_command)
    app.add_typer(data_app, name="data")


def main() -> None:
    """The commands on their own, for `python -m lvlm_decode_evals.commands` and tests."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    add_to(app)
    app(prog_name="lvlm-decode")


if __name__ == "__main__":
    main()
