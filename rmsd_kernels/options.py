"""What a divergence is of: spelled once, checked and completed at the public door, passed whole from there."""

import functools
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from .backends import resolve_backend
from .checks import check_options, check_transform


class Options(NamedTuple):
    """Complete and checked: no field is left for somebody else to fill in. A scan of whole rows has no use for
    `vocab_topk` and `tail`, logits as given none for `logit_scale` and `softcap`."""

    divergence: str  # one of reference.DIVERGENCES
    beta: float  # the teacher's weight in the jsd's mixture
    vocab_topk: int | None  # below vocab_size, or None for the whole vocabulary
    tail: str  # one of reference.TAILS
    temperature: float
    teacher_temperature: float
    vocab_size: int  # columns that count
    logit_scale: float
    softcap: float | None
    backend: str  # "torch" or a name in ops.BACKENDS

    def of_scores(self) -> dict:
        """What reference.token_scores takes of them."""
        return {name: value for name, value in self._asdict().items() if name not in ("vocab_topk", "tail", "backend")}

    def of_divergence(self) -> dict:
        """What reference.token_divergence takes of them."""
        return {name: value for name, value in self._asdict().items() if name != "backend"}


# SymInt, or torch.compile would make a graph for each vocabulary.
_SCHEMA_TYPES = {str: "str", float: "float", int: "SymInt", int | None: "SymInt?", float | None: "float?"}
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Options).items())  # of an operator


def complete_options(
    function: str,  # the public function's name, for the log
    tensor: Tensor,  # logits or hidden states: what a backend must be able to serve
    width: int,  # columns of the logits
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    vocab_topk: int | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Options:
    """The options as a caller gives them, with nothing left out: raises ValueError or TypeError for a wrong one."""
    given = (divergence, beta, vocab_topk, tail, temperature, teacher_temperature, vocab_size, logit_scale, softcap)
    try:
        complete = _complete if torch.compiler.is_compiling() else _complete_once
        options = complete(width, *given)
    except TypeError:  # not hashable, or refused: then once more, to be told why
        options = _complete(width, *given)
    return options._replace(backend=resolve_backend(backend, tensor, function))


def _complete(
    width, divergence, beta, vocab_topk, tail, temperature, teacher_temperature, vocab_size, logit_scale, softcap
) -> Options:
    check_transform(logit_scale, softcap)
    check_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        width=width,
        vocab_topk=vocab_topk,
        tail=tail,
    )
    vocab_size = vocab_size or width
    return Options(
        divergence=divergence,
        beta=beta,
        # A support as wide as the vocabulary is the vocabulary: the same sum without the search.
        vocab_topk=None if vocab_topk is None or vocab_topk >= vocab_size else vocab_topk,
        tail=tail,
        temperature=temperature,
        teacher_temperature=teacher_temperature or temperature,
        vocab_size=vocab_size,
        logit_scale=logit_scale,
        softcap=softcap,
        backend="torch",
    )


# A training run asks for the same few over and over, and to check them takes a fifth of a call's time on the host.
_complete_once = functools.lru_cache(maxsize=256, typed=True)(_complete)
