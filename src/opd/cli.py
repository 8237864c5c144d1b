"""The command line. Commands import heavy modules only when called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from opd.errors import ConfigError, OPDError
from opd.stage.interrupt import StopNow, Stopped
from opd.stage.quiet import quiet_libraries

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="On-policy distillation of language models.",
)


def _recipes(incomplete: str) -> list[str]:
    """What a recipe's argument may be completed to."""
    from opd.commands.recipes import completed

    return completed(incomplete)


def _methods(incomplete: str) -> list[str]:
    """What a method's name may be completed to."""
    from opd.commands.methods import names

    return [name for name in names() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(help="A recipe: a YAML file, or a name of `opd recipes`", metavar="RECIPE", autocompletion=_recipes),
]


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, e.g. seed=1 stages.distil.steps=5", metavar="[KEY=VALUE]...")
]


Columns = Annotated[list[str] | None, typer.Option("--column", help="opd's column = the data's, e.g. prompt=messages")]
Chat = Annotated[bool, typer.Option(help="Wrap text prompts as a user's message")]


def _show_version(show: bool) -> None:
    if show:
        from opd import __version__

        typer.echo(f"opd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    """On-policy distillation of language models."""


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Continue a run whose recipe, rows, models or code have changed")
    ] = False,
) -> None:
    """Run a recipe. The same command continues a stopped run.

    Under torchrun, its processes share the work: torchrun --nproc-per-node 2 -m opd train RECIPE
    """
    from opd.parallel import join

    quiet_libraries()
    with join() as world:
        from opd.recipe.load import load_recipe

        resolved = load_recipe(recipe, overrides or [])
        from opd.commands.waiting import set_waiting
        from opd.stage.progress import Progress, RunConsole

        console = RunConsole()
        progress = Progress(console=console)
        set_waiting(progress.note)  # before the next two imports, which load torch
        from opd.commands.report.console import print_report
        from opd.runs.stages import run_recipe

        try:
            run_recipe(resolved, progress=progress, world=world, accept_changes=accept_changes)
        except StopNow as now:
            text = "Stopped at once. The same command continues from the last checkpoint."
            raise Stopped(text, now.signal) from None
        if world.main:
            print_report(resolved, console)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    live: Annotated[bool, typer.Option("--live", help="Also contact the servers of teachers and engines")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON")] = False,
) -> None:
    """Find errors in a recipe before any weight is loaded."""
    from opd.commands.check import checked_recipe, refusal_as_json
    from opd.recipe.load import load_recipe

    try:
        resolved = load_recipe(recipe, overrides or [])
        quiet_libraries()
        found = checked_recipe(resolved, live=live)
    except OPDError as error:
        if not json:
            raise
        typer.echo(refusal_as_json(recipe, error))
        raise typer.Exit(_status(error)) from error
    if json:
        typer.echo(found.as_json(recipe))
        return
    for line in found.lines:
        typer.echo(line)
    typer.echo(f"{recipe}: nothing wrong found.")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="b200, h200, h100, a100-80, a100-40, l40s or rtx-4090")] = "h100",
    devices: Annotated[int, typer.Option(min=1, help="Number of devices, one process each")] = 1,
    memory_gib: Annotated[float | None, typer.Option(help="In place of the device's own")] = None,
    tflops: Annotated[float | None, typer.Option(help="In place of the device's own, of every precision")] = None,
    bandwidth_gbs: Annotated[float | None, typer.Option(help="Of its memory, in place of the device's own")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the longest prompt's")] = None,
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the prompt that the teacher reads; default: the prompt's")
    ] = None,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's limit")] = None,
) -> None:
    """Before a run: memory per device, bytes and seconds of a step, and what limits them. Loads no weights."""
    from opd.commands.plan.devices import device_of
    from opd.recipe.load import load_recipe

    device = device_of(gpu, memory_gib=memory_gib, tflops=tflops, bandwidth_gbs=bandwidth_gbs)
    resolved = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from opd.commands.plan.recipe import Lengths
    from opd.commands.plan.tables import plan_recipe

    lengths = Lengths(prompt=prompt_tokens, context=context_tokens, response=response_tokens)
    for line in plan_recipe(resolved, device, devices, lengths):
        typer.echo(line)


@app.command()
def doctor(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Default: the first with a teacher (or the student itself)")] = None,
    task: Annotated[str | None, typer.Option(help="One of the stage's tasks, if it has tasks")] = None,
    prompts: Annotated[int, typer.Option(help="The number of the stage's prompts to use")] = 16,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sample; default: the recipe's")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Before a run: will this teacher teach this student? Verdict, reasons, remedies. Exit status 3 for stop."""
    from opd.commands.waiting import set_waiting
    from opd.recipe.load import load_recipe

    def say(text: str) -> None:
        typer.echo(f"doctor: {text}", err=True)

    resolved = load_recipe(recipe, overrides or [])
    quiet_libraries()
    set_waiting(say)
    from opd.commands.doctor.examine import examine
    from opd.commands.doctor.findings import as_json, as_text
    from opd.stage.doctor_file import keep

    report = examine(
        resolved,
        stage=stage,
        task=task,
        prompts=prompts,
        seed=seed,
        say=say,
    )
    typer.echo(as_json(report) if json else as_text(report))
    keep(resolved, as_json(report))
    if report.verdict == "stop":
        raise typer.Exit(3)


@app.command()
def probe(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    teachers: Annotated[
        list[str] | None, typer.Option(help="Models of the recipe: NAME,NAME; default: the stage's teacher")
    ] = None,
    contexts: Annotated[
        list[str] | None, typer.Option(help="plain, stage, answer, solution, hint, history, or a template (plain)")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Default: the first with a teacher (or the student itself)")] = None,
    task: Annotated[str | None, typer.Option(help="One of the stage's tasks, if it has tasks")] = None,
    prompts: Annotated[int, typer.Option(help="The number of the stage's prompts to use")] = 16,
    responses: Annotated[int, typer.Option(help="The student's responses per prompt")] = 200,
    visits: Annotated[int, typer.Option(help="Continuations per forced token")] = 100,
    nodes: Annotated[int, typer.Option(help="Nodes per prompt, on right responses and as many on wrong ones")] = 8,
    tau: Annotated[float, typer.Option(help="Force tokens to which a model gives more than this probability")] = 0.05,
    form: Annotated[str, typer.Option(help="Rank teachers by reverse_kl or forward_kl")] = "reverse_kl",
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sample; default: the recipe's")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only sample the responses, and say the cost")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Which teacher and context point to right responses? Trains nothing. Exit status 3 if none does."""
    from opd.commands.waiting import set_waiting
    from opd.recipe.load import load_recipe

    def say(text: str) -> None:
        typer.echo(f"probe: {text}", err=True)

    resolved = load_recipe(recipe, overrides or [])
    quiet_libraries()
    set_waiting(say)
    from opd.commands.probe.measure import Settings, measured, planned, subject_of
    from opd.commands.probe.report import as_json, as_text

    sizes = Settings(prompts=prompts, responses=responses, visits=visits, nodes=nodes, tau=tau, form=form)
    subject = subject_of(
        resolved, teachers=teachers or [], contexts=contexts or [], stage=stage, task=task, settings=sizes, seed=seed
    )
    plan = planned(subject, say)
    if dry_run:
        return
    report = measured(plan, say)
    typer.echo(as_json(report) if json else as_text(report))
    if report.choice is None or report.choice.best is None:
        raise typer.Exit(3)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, hub id, GGUF file, or package:NAME/FILE")],
    data: Annotated[str | None, typer.Argument(help="Held-out prompts: a file, reasoning_gym:TASK, ...")] = None,
    reward: Annotated[str | None, typer.Option(help="exact, math_verify, ..., or my_package.mine:function")] = None,
    options: Annotated[list[str] | None, typer.Option("--option", help="Option of the reward: key=value")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-eval: NAME,NAME, a YAML file, or NAME=FOLDER with its data")
    ] = None,
    task_folder: Annotated[str | None, typer.Option(help="A folder with YAML files of further tasks")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a task's prompt; default: its own")
    ] = None,
    n: Annotated[int | None, typer.Option(help="Responses per prompt (1)")] = None,
    temperature: Annotated[float | None, typer.Option(help="1.0, of tasks their own")] = None,
    top_p: Annotated[float | None, typer.Option(help="1.0, of tasks their own")] = None,
    max_completion_length: Annotated[int | None, typer.Option(help="256, of tasks their own")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts, of each task too")] = None,
    columns: Columns = None,
    chat: Chat = False,
    teacher: Annotated[str | None, typer.Option(help="Report the exact divergence from this model")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: 0, or the recipe's")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Measure as this recipe does, a YAML file or a name", autocompletion=_recipes)
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Of the recipe; default: the last with `evaluate`")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override of the recipe: key=value", metavar="KEY=VALUE")
    ] = None,
    responses: Annotated[str | None, typer.Option(help="Write the responses to this file, as JSON lines")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON")] = False,
) -> None:
    """Measure a model on held-out prompts or lm-eval's tasks: avg@n, pass@k with intervals, lengths, repetition."""
    say = _prepared("eval")
    from opd.commands.eval_arguments import Arguments

    sampling = {"n": n, "temperature": temperature, "top_p": top_p, "max_completion_length": max_completion_length}
    given = Arguments(
        model=model,
        data=data,
        reward=reward,
        options=options or [],
        task_names=[name for one in tasks or [] for name in one.split(",") if name],
        task_folder=task_folder,
        fewshot=fewshot,
        sampling={key: value for key, value in sampling.items() if value is not None},
        limit=limit,
        columns=columns or [],
        chat=chat,
        teacher=teacher,
        seed=seed,
        recipe=recipe,
        stage=stage,
        settings=settings or [],
        responses=responses,
    )
    for line in given.lines(say, as_json=json):
        typer.echo(line)


@app.command()
def rollouts(
    model: Annotated[str, typer.Argument(help="A model folder, hub id, GGUF file, or package:NAME/FILE")],
    data: Annotated[str, typer.Option(help="Prompts: a file, reasoning_gym:TASK, ...")],
    out: Annotated[str, typer.Option(help="The file to write: FILE.parquet")],
    n: Annotated[int, typer.Option(help="Responses per prompt")] = 1,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    max_completion_length: Annotated[int, typer.Option()] = 256,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts")] = None,
    columns: Columns = None,
    chat: Chat = False,
    top_k: Annotated[
        int, typer.Option(help="Also write the model's K most likely tokens at each position; limits no sampling")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a model's responses to a Parquet file of records (docs/records.md)."""
    say = _prepared("rollouts")
    from opd.commands.rollouts import write_rollouts

    if not model:
        raise ConfigError("opd rollouts got an empty path of a model. Give a folder, a hub id or a GGUF file.")
    named = {name: column for name, _, column in (one.partition("=") for one in columns or [])}
    sampling = {"n": n, "temperature": temperature, "top_p": top_p, "max_completion_length": max_completion_length}
    section = {"path": data, "limit": limit, "chat": chat, "columns": named}
    typer.echo(write_rollouts(model, data=section, sampling=sampling, out=out, top_k=top_k, seed=seed, say=say))


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="Responses: a Parquet file with prompt_ids and response_ids")],
    teacher: Annotated[
        str, typer.Option(help="A model folder, hub id or GGUF file, or vLLM servers: http://HOST:PORT,http://...")
    ],
    support: Annotated[
        str, typer.Option(help="Scored tokens: sampled, or k of the teacher or the student")
    ] = "sampled",
    k: Annotated[int | None, typer.Option(help="The number of tokens of the support")] = None,
    top_k: Annotated[int, typer.Option(help="Also write the teacher's K most likely tokens")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer of the ids; default: of the model that wrote the file")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="The servers' name of the model; default: the only one")
    ] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the servers' key")] = None,
    out: Annotated[str | None, typer.Option(help="The file to write; default: FILE, which is replaced")] = None,
) -> None:
    """Add a teacher's scores to a Parquet file of responses (docs/records.md)."""
    say = _prepared("score")
    from opd.commands.score import score_file

    if not teacher:
        raise ConfigError("opd score got an empty path of a model. Give a folder, a hub id, a GGUF file or an address.")
    line = score_file(
        file,
        teacher=teacher,
        support=support,
        k=k,
        top=top_k,
        tokenizer=tokenizer,
        served_model=served_model,
        api_key_env=api_key_env,
        out=out,
        say=say,
    )
    typer.echo(line)


def _prepared(command: str) -> Callable[[str], None]:
    """What a command's notes go to, once the process is ready to load torch."""
    from opd.commands.waiting import set_waiting

    def say(text: str) -> None:
        typer.echo(f"{command}: {text}", err=True)

    quiet_libraries()
    set_waiting(say)
    return say


RunArguments = Annotated[list[str], typer.Argument(help="Folders of runs, e.g. runs/quickstart", metavar="RUN...")]


@app.command()
def report(
    runs: RunArguments,
    out: Annotated[str | None, typer.Option("-o", "--out", help="The file; default: RUN/report.html")] = None,
    stage: Annotated[
        str | None, typer.Option(help="Default: all stages; of several runs the last that all have")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of responses that the page holds")] = 150_000,
    samples: Annotated[int, typer.Option(min=0, help="Responses of each file of samples")] = 8,
    no_text: Annotated[bool, typer.Option("--no-text", help="Numbers alone: no prompt, response or recipe")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser")] = False,
) -> None:
    """Write one HTML file about a run, or about several side by side (docs/report.md)."""
    from opd.commands.report.pages import Options, report_runs

    options = Options(tokens=tokens, samples=samples, text=not no_text)
    report_runs(runs, out, stage, options, opens=open_, say=typer.echo)


@app.command()
def compare(
    runs: RunArguments,
    stage: Annotated[str | None, typer.Option(help="Default: the last that all have; between stages: all")] = None,
    by: Annotated[str, typer.Option(help="Prompts are the same by their text (prompt) or their place (id)")] = "prompt",
    between: Annotated[
        str | None,
        typer.Option(help="runs; recipes or stages: means over seeds. Default: runs, of several seeds the others"),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The row that others are compared with; default: the first")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Write a page to this file instead")] = None,
) -> None:
    """Compare runs on the same held-out prompts, or recipes and stages over their runs' seeds (docs/report.md)."""
    from opd.commands.report.pages import compare_runs

    compare_runs(runs, stage=stage, by=by, between=between, against=against, json=json, out=out)


@app.command()
def view(
    run: Annotated[str, typer.Argument(help="A run's folder, e.g. runs/quickstart", metavar="RUN")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Default: a free one")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address alone")] = False,
) -> None:
    """Show a run's page while the run works: on this machine alone, until Ctrl-C (docs/report.md)."""
    from opd.commands.view import serve_run

    serve_run(run, port=port, browser=not no_browser, say=typer.echo)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(help="A run's folder, e.g. runs/quickstart", metavar="RUN")],
    stage: Annotated[str | None, typer.Option(help="Default: the last that has begun")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one screen and end, also for pipes")] = False,
) -> None:
    """Show a run in the terminal while it works: numbers, held-out results, its last response. q ends it."""
    from opd.commands.watch import watch_run

    watch_run(run, stage=stage, once=once)


@app.command()
def push(
    run: Annotated[str, typer.Argument(help="A run's folder, e.g. runs/NAME, or a model's folder")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; created if it does not exist")],
    stage: Annotated[str | None, typer.Option(help="Default: the stage that finished last")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter, if the stage also has a model")] = False,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository; default: private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files")] = False,
) -> None:
    """Upload a finished stage's model, with its card, to the Hugging Face hub."""
    quiet_libraries()
    from opd.commands.push import push as upload

    upload(run, repo, stage=stage, adapter=adapter, public=public, dry_run=dry_run, say=typer.echo)


@app.command()
def methods() -> None:
    """List the methods."""
    from opd.commands.methods import headline, names

    width = max(map(len, names()))
    for name in names():
        typer.echo(f"{name:{width}}  {headline(name)}")


@app.command()
def describe(
    method: Annotated[str, typer.Argument(help="A method's name, or my_package.mine:method", autocompletion=_methods)],
    cite: Annotated[bool, typer.Option("--cite", help="Only the BibTeX entries of its papers")] = False,
) -> None:
    """A method's paper, formula, symbols and options."""
    from opd.commands.methods import citations, description

    typer.echo(citations(method) if cite else description(method))


@app.command()
def recipes(
    copy: Annotated[
        str | None, typer.Option("--copy", metavar="NAME", help="Write a recipe and its schema to this folder")
    ] = None,
) -> None:
    """List the recipes in the package: name, CPU minutes, methods, description. `opd train NAME` runs one."""
    from opd.commands.recipes import copied, lines

    for line in lines() if copy is None else copied(copy):
        typer.echo(line)


@app.command()
def init(
    student: Annotated[str | None, typer.Option(help="A model folder, hub id or GGUF file")] = None,
    teacher: Annotated[str | None, typer.Option(help="The same, servers as http://HOST:PORT,..., or none")] = None,
    data: Annotated[str | None, typer.Option(help="Prompts: a file, reasoning_gym:TASK, ...")] = None,
    also: Annotated[
        str | None,
        typer.Option(help="nothing, the name of a reward, privileged, rule=TEXT, or responses (nothing)"),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Steps of training (200)")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run; default: the student's")] = None,
    out: Annotated[str | None, typer.Option(help="The file to write; default: NAME.yaml")] = None,
) -> None:
    """Write a recipe from the answers to six questions. Without a terminal the options answer them."""
    from opd.commands.init import answers, written

    def prompt(question: str, default: str | None) -> str:
        return str(typer.prompt(question, default=default))

    given = {"student": student, "teacher": teacher, "data": data, "also": also, "budget": budget, "name": name}
    quiet_libraries()
    files = written(answers(given, prompt if sys.stdin.isatty() else None), out)
    for file in files:
        typer.echo(f"{file} written")
    typer.echo(f"Next: opd doctor {files[0]}, then opd train {files[0]}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from opd.recipe.json_schema import schema_text

    typer.echo(schema_text(), nl=False)


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="A study; without one, the list", metavar="[NAME]")] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all, and write docs/studies.md")] = False,
    pages: Annotated[bool, typer.Option("--pages", help="Run none; write the pages of the results again")] = False,
    out: Annotated[
        str | None, typer.Option(help="Folder of results (default: runs/studies; docs with --all or --pages)")
    ] = None,
) -> None:
    """Rerun a paper's claims on small models: measurements with intervals, a verdict and a figure."""
    quiet_libraries()
    if name is not None or every:  # the list needs no model
        from opd.commands.waiting import set_waiting

        set_waiting(lambda text: typer.echo(f"study: {text}", err=True))
    try:
        from opd_studies.page.command import command
    except ModuleNotFoundError as error:
        if error.name != "opd_studies":
            raise
        raise ConfigError("opd study needs the package opd-studies: pip install opd-studies.") from None
    command(name, every, pages, out)


def main() -> None:
    """Entry point: an OPDError prints one message, without a traceback."""
    try:
        app()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except OPDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(_status(error))


def _status(error: OPDError) -> int:
    """The exit status of a command that an error ends: 2 for what the user gave, 1 for what happened in a run."""
    return 2 if isinstance(error, ValueError) else 1
