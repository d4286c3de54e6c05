"""A user's own Python files: a task's, an environment's."""

import runpy
import sys
import traceback
from pathlib import Path

from .words import named_line


def defined_in(path: str | Path, kind: str) -> dict:
    """What a Python file defines, by name. As a script does, it finds the modules that lie beside it.

    Args:
        kind: "task" or "environment", for what is said.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it fails, with the line that did.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{kind} file {path} does not exist")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that nothing installed is hidden; it stays, for imports inside functions
    try:
        return runpy.run_path(str(path))
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{kind} file {path}{where}: {named_line(error)}") from error
