"""What users may rely on: names and defaults, what errors say, that nothing changes from run to run, that nothing waits
for the device."""

import inspect
import math

import inputs
import pytest
import torch
from conftest import device_of, skip_unless_served
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import rmsd
import rmsd_kernels
from rmsd_kernels import (
    linear_token_divergence,
    linear_token_logprobs,
    linear_token_scores,
    scores_and_candidates,
    select_tokens,
    token_divergence,
    token_scores,
)

NEEDED = inspect.Parameter.empty
OPTIONS = dict(
    divergence="reverse_kl", beta=0.5, temperature=1.0, teacher_temperature=None, vocab_size=None, backend="auto"
)
TOPK = dict(vocab_topk=None, tail="bucket")
HEAD = dict(student_bias=None, teacher_bias=None, logit_scale=1.0, softcap=None, workspace_mb=None)
LOSS = dict(
    num_candidates=20,
    num_kept=5,
    criterion="logprob_gap",
    threshold=0.0,
    divergence="reverse_kl",
    beta=0.5,
    vocab_topk=500,
    tail="bucket",
    temperature=1.0,
    backend="auto",
)
HEADS = "student_hidden student_weight teacher_hidden teacher_weight"
PAIR = "student_logits teacher_logits"

# callable: (positional names, keyword-only names and their defaults)
SIGNATURES = {
    token_scores: (f"{PAIR} sampled_ids", OPTIONS),
    linear_token_scores: (f"{HEADS} sampled_ids", HEAD | OPTIONS),
    linear_token_logprobs: (
        "hidden weight sampled_ids",
        dict(
            bias=None,
            logit_scale=1.0,
            softcap=None,
            workspace_mb=None,
            temperature=1.0,
            vocab_size=None,
            backend="auto",
        ),
    ),
    select_tokens: ("score mask", dict(num_tokens=NEEDED, threshold=0.0, backend="auto")),
    scores_and_candidates: (
        f"{PAIR} sampled_ids mask",
        dict(num_candidates=20, criterion="logprob_gap", threshold=0.0) | OPTIONS,
    ),
    token_divergence: (PAIR, dict(rows=None) | TOPK | OPTIONS),
    linear_token_divergence: (HEADS, dict(rows=None) | HEAD | TOPK | OPTIONS),
    rmsd.RMSDLoss.__init__: ("self", LOSS),
    rmsd.LinearRMSDLoss.__init__: ("self", LOSS),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_names_and_defaults_are_frozen(function):
    names, options = SIGNATURES[function]
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names.split()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == options
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)


def test_the_losses_forward():
    """keep is the judge's answer and may be left out; what a training loop adds is keyword-only."""
    for loss, tensors in ((rmsd.RMSDLoss, PAIR), (rmsd.LinearRMSDLoss, HEADS)):
        parameters = inspect.signature(loss.forward).parameters
        positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == ["self", *tensors.split(), "sampled_ids", "completion_mask", "keep"]
        assert parameters["keep"].default is None and parameters["num_sequences"].default is None
        candidates = inspect.signature(loss.candidates).parameters
        positional = [p.name for p in candidates.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == ["self", *tensors.split(), "sampled_ids", "completion_mask"]


def test_exports():
    assert set(rmsd_kernels.__all__) == {
        "TokenLogprobs",
        "TokenScores",
        "criterion_score",
        "linear_token_divergence",
        "linear_token_logprobs",
        "linear_token_scores",
        "scores_and_candidates",
        "select_tokens",
        "token_divergence",
        "token_scores",
        "vocab_parallel_linear_token_divergence",
        "vocab_parallel_linear_token_scores",
    }
    assert rmsd_kernels.TokenScores._fields == (
        "student_logprob",
        "teacher_logprob",
        "divergence",
        "student_lse",
        "teacher_lse",
        "student_entropy",
        "teacher_entropy",
    )
    assert list(inspect.signature(rmsd_kernels.criterion_score).parameters) == ["scores", "criterion"]
    for name in ("RMSDLoss", "LinearRMSDLoss", "RMSDConfig", "RMSDTrainer"):
        assert getattr(rmsd, name)


# ---- errors: the argument, what it was, what it must be --------------------------------------------------

STUDENT, TEACHER, _ = inputs.far_apart((2, 3, 8))
IDS, MASK = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
HIDDEN, WEIGHT = torch.randn(2, 3, 4), torch.randn(8, 4)
GOOD = dict(
    student_logits=STUDENT,
    teacher_logits=TEACHER,
    sampled_ids=IDS,
    mask=MASK,
    score=STUDENT[..., 0],
    num_tokens=2,
    student_hidden=HIDDEN,
    student_weight=WEIGHT,
    teacher_hidden=HIDDEN,
    teacher_weight=WEIGHT,
    hidden=HIDDEN,
    weight=WEIGHT,
)


def call(function, **wrong):
    names, options = SIGNATURES[function]
    needed = names.split() + [name for name, default in options.items() if default is NEEDED]
    return function(**{name: GOOD[name] for name in needed} | wrong)


WRONG = [
    # function, argument, value, error, what it was, what it must be
    (token_scores, "student_logits", [1.0], TypeError, "list", "tensor"),
    (token_scores, "student_logits", STUDENT.int(), TypeError, "torch.int32", "float32, float16, bfloat16 or float64"),
    (token_scores, "student_logits", STUDENT[0, 0], ValueError, "(8,)", "(N, V) or (B, L, V)"),
    (token_scores, "student_logits", STUDENT[..., :0], ValueError, "(2, 3, 0)", "V >= 1"),
    (
        token_scores,
        "teacher_logits",
        TEACHER.half(),
        TypeError,
        "torch.float16",
        "student_logits's dtype torch.float32",
    ),
    (token_scores, "teacher_logits", TEACHER[:, :2], ValueError, "(2, 2, 8)", "(2, 3, 8)"),
    (token_scores, "teacher_logits", TEACHER.to("meta"), ValueError, "meta", "device cpu"),
    (token_scores, "sampled_ids", IDS.float(), TypeError, "torch.float32", "int64"),
    (token_scores, "sampled_ids", [0], TypeError, "list", "int64"),
    (token_scores, "sampled_ids", IDS[:1], ValueError, "(1, 3)", "(2, 3)"),
    (token_scores, "sampled_ids", IDS + 8, ValueError, "8", "[0, 8)"),
    (token_scores, "sampled_ids", IDS - 100, ValueError, "-100", "[0, 8)"),
    (token_scores, "sampled_ids", IDS.to("meta"), ValueError, "meta", "cpu"),
    (token_scores, "divergence", "kl", ValueError, "'kl'", "reverse_kl, forward_kl, jsd"),
    (token_scores, "temperature", 0.0, ValueError, "0.0", "above 0"),
    (token_scores, "temperature", math.nan, ValueError, "nan", "finite"),
    (token_scores, "teacher_temperature", -1.0, ValueError, "-1.0", "above 0"),
    (token_scores, "teacher_temperature", 0.0, ValueError, "0.0", "above 0"),
    (token_scores, "vocab_size", 9, ValueError, "9", "between 1 and the logits' width 8"),
    (token_scores, "vocab_size", 0, ValueError, "0", "between 1"),
    (token_scores, "backend", "cuda", ValueError, "'cuda'", "auto, torch, triton or cpu"),
    (select_tokens, "score", STUDENT, ValueError, "(2, 3, 8)", "(B, L)"),
    (select_tokens, "score", IDS, TypeError, "torch.int64", "float32"),
    (select_tokens, "mask", MASK.int(), TypeError, "torch.int32", "bool"),
    (select_tokens, "mask", MASK[:, :2], ValueError, "(2, 2)", "(2, 3)"),
    (select_tokens, "mask", MASK.to("meta"), ValueError, "meta", "cpu"),
    (select_tokens, "num_tokens", 0, ValueError, "0", "at least 1"),
    (select_tokens, "threshold", math.nan, ValueError, "NaN", "a number"),
    (scores_and_candidates, "mask", MASK[0], ValueError, "(3,)", "(2, 3)"),
    (scores_and_candidates, "num_candidates", 0, ValueError, "0", "at least 1"),
    (scores_and_candidates, "criterion", "gap", ValueError, "'gap'", "logprob_gap, divergence, entropy_gap"),
    (scores_and_candidates, "mask", None, TypeError, "NoneType", "bool"),
    (token_divergence, "tail", "keep", ValueError, "'keep'", "drop, bucket, renorm"),
    (token_divergence, "vocab_topk", 0, ValueError, "0", "at least 1 or None"),
    (token_divergence, "rows", torch.tensor([6]), ValueError, "6", "[0, 6)"),
    (token_divergence, "rows", torch.tensor([-2]), ValueError, "-2", "[0, 6)"),
    (token_divergence, "rows", torch.tensor([0.0]), TypeError, "torch.float32", "int64"),
    (token_divergence, "rows", [0], TypeError, "list", "int64"),
    (token_divergence, "rows", torch.tensor([[0]]), ValueError, "(1, 1)", "(R,)"),
    (token_divergence, "rows", torch.tensor([0], device="meta"), ValueError, "meta", "cpu"),
    (linear_token_logprobs, "weight", WEIGHT.T, ValueError, "(4, 8)", "(V, 4)"),
    (linear_token_scores, "student_hidden", HIDDEN[0, 0], ValueError, "(4,)", "(N, H) or (B, L, H)"),
    (linear_token_scores, "teacher_hidden", HIDDEN[:, :1], ValueError, "(2, 1)", "(2, 3)"),
    (linear_token_scores, "student_weight", WEIGHT.T, ValueError, "(4, 8)", "(V, 4)"),
    (linear_token_scores, "teacher_weight", WEIGHT[:7], ValueError, "7", "vocabulary 8"),
    (linear_token_scores, "teacher_weight", WEIGHT.half(), TypeError, "torch.float16", "dtype torch.float32"),
    (linear_token_scores, "student_bias", WEIGHT[:7, 0], ValueError, "(7,)", "(8,)"),
    (linear_token_scores, "workspace_mb", -1, ValueError, "-1", "above 0 or None"),
    (linear_token_divergence, "workspace_mb", 0, ValueError, "0", "above 0 or None"),
    (linear_token_divergence, "logit_scale", 0.0, ValueError, "0.0", "above 0"),
    (linear_token_divergence, "softcap", -30.0, ValueError, "-30.0", "above 0 or None"),
    (linear_token_divergence, "rows", torch.tensor([7]), ValueError, "7", "[0, 6)"),
]


@pytest.mark.parametrize(
    ("function", "argument", "value", "error", "was", "must"),
    WRONG,
    ids=[f"{n}-{case[0].__name__}-{case[1]}" for n, case in enumerate(WRONG)],
)
def test_an_error_names_the_argument_what_it_was_and_what_it_must_be(function, argument, value, error, was, must):
    call(function)  # right but for the one argument
    with pytest.raises(error) as caught:
        call(function, **{argument: value})
    message = str(caught.value)
    assert message.startswith(argument), message
    assert was in message.replace(argument, "", 1) and must in message, message


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, math.nan])
def test_beta_is_looked_at_for_the_jsd_alone(beta):
    call(token_scores, beta=beta)
    with pytest.raises(ValueError, match=f"^beta must lie strictly between 0 and 1, not {beta}"):
        call(token_scores, beta=beta, divergence="jsd")


def test_a_backend_asked_for_by_name_that_cannot_serve_says_why():
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=rf"^backend='{backend}' cannot serve token_scores: .*float64"):
            call(token_scores, student_logits=STUDENT.double(), teacher_logits=TEACHER.double(), backend=backend)


def test_candidates_need_sequences():
    with pytest.raises(ValueError, match=r"^student_logits must be \(B, L, V\), not \(3, 8\)"):
        call(scores_and_candidates, student_logits=STUDENT[0], teacher_logits=TEACHER[0])


def test_falling_back_is_logged_once_by_name_and_reason(caplog):
    rmsd_kernels.backends._log_fallback.cache_clear()
    for _ in range(2):
        call(token_scores, student_logits=STUDENT.double(), teacher_logits=TEACHER.double())
    (record,) = caplog.records
    assert "token_scores is computed by backend 'torch'" in record.message and "float64" in record.message


# ---- the same again, and never a wait ------------------------------------------------------------


def everything(backend, student, teacher, ids, mask):
    device = device_of(backend)
    student, teacher, ids, mask = (x.to(device) for x in (student, teacher, ids, mask))
    results = []
    for divergence in rmsd_kernels.reference.DIVERGENCES:
        scores, index = scores_and_candidates(
            student, teacher, ids, mask, num_candidates=3, divergence=divergence, backend=backend
        )
        leaf = student.clone().requires_grad_()
        result = token_divergence(leaf, teacher, divergence=divergence, vocab_topk=9, tail="bucket", backend=backend)
        results += [*scores, index, result.detach(), torch.autograd.grad(result.sum(), leaf)[0]]
    return results


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_a_default_dtype_changes_nothing(backend, device, default):
    logits, ids = torch.randn(2, 5, 16, device=device), torch.randint(16, (5,), device=device)

    def results():
        scores = rmsd_kernels.token_scores(*logits, ids, backend=backend)
        return *scores, rmsd_kernels.token_divergence(*logits, backend=backend)

    expected = results()
    torch.set_default_dtype(default)
    try:
        torch.testing.assert_close(results(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_results_do_not_change_from_run_to_run(backend):
    interpreted = backend == "triton" and device_of(backend) == "cpu"  # one operation after the other, 20 ms a tile
    shape, vocab = ((1, 2), 200) if interpreted else ((2, 20), 700)
    student, teacher = inputs.far_apart((*shape, vocab))[:2]
    batch = student, teacher, torch.randint(vocab, shape), torch.ones(shape, dtype=torch.bool)
    assert all(map(torch.equal, everything(backend, *batch), everything(backend, *batch)))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_results_do_not_change_with_the_number_of_threads(backend):
    skip_unless_served(backend)
    student, teacher = inputs.far_apart((2, 9, 5000))[:2]  # 90,000 logits: enough that threads share them
    batch = student, teacher, torch.randint(5000, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    threads = torch.get_num_threads()
    try:
        by_threads = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            by_threads.append(everything(backend, *batch))
    finally:
        torch.set_num_threads(threads)
    for results in by_threads[1:]:
        assert all(map(torch.equal, results, by_threads[0]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_read_back_from_the_device(backend, monkeypatch):
    """Tensors without values: .item(), bool(), or a shape that depends on values raises."""
    monkeypatch.setattr(rmsd_kernels.backends, "why_not", lambda backend, tensor: None)
    student, teacher = torch.randn(2, 2, 3, 8, device="meta")
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    mask = ids == 0
    with pytest.raises(RuntimeError, match="meta"):
        mask.any().item()
    token_scores(student, teacher, ids, backend=backend)
    _, index = scores_and_candidates(student, teacher, ids, mask, backend=backend)
    assert index.shape == (2, 20)
    assert select_tokens(student[..., 0], mask, num_tokens=4, backend=backend).shape == (2, 4)
    for rows in (None, torch.where(mask.flatten(), 1, -1)):
        leaf = student.clone().requires_grad_()
        token_divergence(leaf, teacher, rows=rows, vocab_topk=3, backend=backend).sum().backward()
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_read_back_by_the_linear_forms(backend, monkeypatch):
    """Autocast knows no meta device, so these run on fake CPU tensors, less the checks that only a CPU gets."""
    monkeypatch.setattr(rmsd_kernels.backends, "why_not", lambda backend, tensor: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        rows = torch.zeros(5, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            rows.any().item()
        linear_token_scores(hidden, weight, hidden, weight, rows.new_zeros(2, 3), backend=backend)
        linear_token_divergence(
            hidden, weight, hidden, weight, rows=rows, vocab_topk=3, backend=backend
        ).sum().backward()
        assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape
