"""Logits that hurt: the regimes of the error budget, and shapes and values that each say why they are here."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan


class Case(NamedTuple):
    student: Tensor
    teacher: Tensor
    options: dict = {}  # noqa: RUF012


def _normal(shape, scale=3.0, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def far_apart(shape, dtype=torch.float32) -> Case:
    return Case(_normal(shape).to(dtype), _normal(shape, seed=1).to(dtype))


def nearly_equal(shape, dtype=torch.float32) -> Case:
    """A divergence of 1e-6, the difference of sums a million times larger."""
    student = _normal(shape)
    return Case(student.to(dtype), (student + _normal(shape, 1e-3, seed=1)).to(dtype))


def saturated(shape, dtype=torch.float32) -> Case:
    """+-30: probabilities of 1 and e^-60, whose logarithms still count."""
    return Case((30 * _normal(shape).sign()).to(dtype), (30 * _normal(shape, seed=1).sign()).to(dtype))


def offset(shape, dtype=torch.float32) -> Case:
    """Around 1e4, both models alike: it changes no distribution, and one unit in the last place of a logit is 1e-3."""
    return Case((_normal(shape) + 1e4).to(dtype), (_normal(shape, seed=1) + 1e4).to(dtype))


REGIMES = {function.__name__: function for function in (far_apart, nearly_equal, saturated, offset)}  # x dtypes


def sampled_ids(case: Case, seed: int = 2) -> Tensor:
    limit = case.options.get("vocab_size", case.student.shape[-1])
    return torch.randint(limit, case.student.shape[:-1], generator=torch.Generator().manual_seed(seed))


# ---- shapes --------------------------------------------------------------------------------------------------------
# Each takes a dtype and `wide`, a number of columns that spans several blocks of the backend under test.


def ragged(dtype, wide):
    """331 is prime: no vector, tile or block divides it, and no row but the first is aligned."""
    return far_apart((2, 331), dtype)


def aligned(dtype, wide):
    """Rows of whole 16-byte words take the wide loads."""
    return far_apart((2, 328), dtype)


def above_a_block(dtype, wide):
    """Running maxima and sums are carried from block to block, and the last block is ragged."""
    return far_apart((2, wide), dtype)


def rising(dtype, wide):
    """Every block brings a new maximum, by more than e^-87 holds: each rescale counts."""
    rise = torch.linspace(-100, 100, wide)
    return Case((rise + _normal((2, wide))).to(dtype), (rise + _normal((2, wide), seed=1)).to(dtype))


def falling_teacher(dtype, wide):
    """The maximum comes first in one row and last in the other."""
    rise = torch.linspace(-20, 20, wide)
    return Case((rise + _normal((2, wide))).to(dtype), (_normal((2, wide), seed=1) - rise).to(dtype))


def below_a_block(dtype, wide):
    """Less than one vector."""
    return far_apart((3, 5), dtype)


def one_entry(dtype, wide):
    """V = 1: every log-probability, divergence, entropy and gradient is 0."""
    return far_apart((3, 1), dtype)


def one_row(dtype, wide):
    return far_apart((1, 40), dtype)


def no_rows(dtype, wide):
    """N = 0: nothing to launch."""
    return far_apart((0, 40), dtype)


def no_length(dtype, wide):
    """L = 0: nothing to launch, and no division by L."""
    return far_apart((2, 0, 40), dtype)


def many_rows(dtype, wide):
    """A GPU's second and third grid axes end at 65,535."""
    return far_apart((70_000, 2), dtype)


def sliced_ends(dtype, wide):
    """The usual shift: (B, L, V) views whose sequences are not adjacent, each cut at another end."""
    case = far_apart((2, 3, 40), dtype)
    return Case(case.student[:, :-1], case.teacher[:, 1:])


def sliced_columns(dtype, wide):
    """Rows are contiguous but start anywhere."""
    case = far_apart((3, 47), dtype)
    return Case(case.student[:, 3:43], case.teacher[:, 5:45])


def transposed(dtype, wide):
    """(V, N).T: a row is not contiguous."""
    case = far_apart((40, 3), dtype)
    return Case(case.student.T, case.teacher.T)


def length_first(dtype, wide):
    """(L, B, V) seen as (B, L, V): N rows are not one stride apart."""
    case = far_apart((3, 2, 40), dtype)
    return Case(case.student.transpose(0, 1), case.teacher.transpose(0, 1).contiguous())


def one_teacher_row(dtype, wide):
    """An expanded row: stride 0."""
    case = far_apart((3, 40), dtype)
    return Case(case.student, case.teacher[:1].expand(3, 40))


def padded_vocabulary(dtype, wide):
    """Columns past vocab_size hold rubbish that must not be read as logits."""
    case = far_apart((2, 331), dtype)
    case.student[:, 300:], case.teacher[:, 300:] = NAN, INF
    return Case(case.student, case.teacher, dict(vocab_size=300))


# ---- values --------------------------------------------------------------------------------------------------------


def banned_by_both(dtype, wide):
    """0 log(0 / 0) is 0; a whole block of it is, too, before anything finite has come."""
    case = far_apart((2, 331), dtype)
    for logits in case[:2]:
        logits[:, :150] = logits[:, 200::3] = -INF
    return case


def banned_by_teacher(dtype, wide):
    """In the second row only, so that the other's numbers are still looked at."""
    case = far_apart((2, 331), dtype)
    case.teacher[1, 160] = -INF
    return case


def banned_by_student(dtype, wide):
    case = far_apart((2, 331), dtype)
    case.student[1, 160] = -INF
    return case


def banned_where_student_underflows(dtype, wide):
    """The student's mass there is e^-200, 0 in fp32; the divergence is infinite all the same."""
    case = far_apart((2, 331), dtype)
    case.student[1, 160], case.teacher[1, 160] = -200.0, -INF
    return case


def nan_rows(dtype, wide):
    """A NaN in either model, first, last, and beside a -inf."""
    case = far_apart((3, 331), dtype)
    case.student[0, 0] = case.teacher[1, -1] = case.student[2, 200] = NAN
    case.student[2, 201] = -INF
    return case


def infinite_rows(dtype, wide):
    """+inf is no logit."""
    case = far_apart((2, 331), dtype)
    case.student[0, 130] = case.teacher[1, 3] = INF
    return case


def empty_rows(dtype, wide):
    """No finite logit in one model, in the other, in both."""
    case = far_apart((3, 200), dtype)
    case.student[0] = case.teacher[1] = case.student[2] = case.teacher[2] = -INF
    return case


def equal(dtype, wide):
    """The divergence is 0 and its gradient vanishes: what is left is rounding."""
    student = far_apart((2, 328), dtype).student
    return Case(student, student.clone())


def huge(dtype, wide):
    """1e4: one unit in the last place of a log-sum-exp is 1e-3."""
    case = far_apart((2, 331))
    return Case((case.student * 3e3).to(dtype), (case.teacher * 3e3).to(dtype))


def shifted_apart(dtype, wide):
    """A constant on every logit of a row changes nothing, and must not cost digits: the rows' differences are 2,000."""
    case = far_apart((2, 331))
    return Case((case.student + 1000).to(dtype), (case.teacher - 1000).to(dtype))


def constant(dtype, wide):
    """All logits tie: the support of a top-k is the lowest ids."""
    return Case(torch.full((2, 328), 2.5, dtype=dtype), far_apart((2, 328), dtype).teacher)


def tied(dtype, wide):
    """About seven values among 331 logits, zeros of both signs among them."""
    case = far_apart((2, 331))
    return Case(case.student.round().to(dtype), case.teacher.round().to(dtype))


def one_certain(dtype, wide):
    """p = 1 at one token, and the teacher agrees but for a little."""
    case = far_apart((2, 331), dtype)
    case.student[:, 77], case.teacher[:, 77] = 60.0, 50.0
    return case


SHAPES = (
    ragged,
    aligned,
    above_a_block,
    rising,
    falling_teacher,
    below_a_block,
    one_entry,
    one_row,
    no_rows,
    no_length,
    many_rows,
    sliced_ends,
    sliced_columns,
    transposed,
    length_first,
    one_teacher_row,
    padded_vocabulary,
)
VALUES = (
    banned_by_both,
    banned_by_teacher,
    banned_by_student,
    banned_where_student_underflows,
    nan_rows,
    infinite_rows,
    empty_rows,
    equal,
    huge,
    shifted_apart,
    constant,
    tied,
    one_certain,
)
CASES = {function.__name__: function for function in (*SHAPES, *VALUES)}


def make(name: str, dtype: torch.dtype, backend: str) -> Case:
    return CASES[name](dtype, 300 if backend == "triton" else 4999)


def too_slow_to_interpret(name: str, backend: str, device: str) -> bool:
    return name == "many_rows" and backend == "triton" and device == "cpu"
