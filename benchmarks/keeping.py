"""What commands that train leave behind them: whole files, runs of what is asked for and of nothing else, and no
process that trains on."""

import contextlib
import signal
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import yaml

from rmsd.run.recipe import Recipe


def write(path: Path, text: str) -> None:
    """Whole, or as it was before: a file cut off by a full disk or a kill would end every later command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def killed_as_interrupted() -> Iterator[None]:
    """A kill (SIGTERM) ends what this process waits for too, as Ctrl-C does: left alone, that would train on, in the
    folder that the next command goes on in."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check(run: Path, asked: Recipe, *, keys: Collection[str] = (), but: Collection[str] = ()) -> None:
    """Holds the run that a folder has to what is asked for: of its recipe these keys, or all `but` some.

    Raises:
        ValueError: it was made otherwise, and would pass for what is asked for.
    """
    path = run / "recipe.yaml"
    if not path.exists():
        return
    was, wanted = (_flat(values) for values in (yaml.safe_load(path.read_text("utf-8")), asked.model_dump(mode="json")))
    for key in keys or sorted(was.keys() | wanted.keys()):
        # An argument of training that only one of them names is a difference. Another key is newer than the run.
        known = key.startswith("train.") or (key in was and key in wanted)
        if key not in but and known and was.get(key) != wanted.get(key):
            raise ValueError(f"{run} was made with {key}={was.get(key)}, not {wanted.get(key)}: name another --runs")


def _flat(recipe: dict) -> dict:
    """By "section.key", and by section whether it is there."""
    found = {name: "a section" if isinstance(value, dict) else value for name, value in recipe.items()}
    sections = ((name, section) for name, section in recipe.items() if isinstance(section, dict))
    return found | {f"{name}.{key}": value for name, section in sections for key, value in section.items()}
