"""Whatever the shape, strides, dtype, options and values: every backend agrees with the reference.

The budget is the one of tests/budget.py with an allowance for luck, since a drawn case may be a single row that plain
torch happens to round well: its error counts as at least a unit in the last place of the largest value, and half a unit
of the scaled logits (up to 256 of them), which a temperature alone may cost. Without it one drawn row in some thousands
overruns: 2.23e-6 where plain torch had 3.8e-7, logits of +-60 divided by 0.7.
HYPOTHESIS_PROFILE=thorough runs 2,000 examples of each. FUZZ_BACKENDS=torch,cpu leaves the slow interpreter out.
"""

import os

import budget
import pytest
import torch
from conftest import BACKENDS, device_of, skip_unless_served
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

import rmsd_kernels as rk
from rmsd_kernels import reference

FUZZED = os.environ.get("FUZZ_BACKENDS", ",".join(BACKENDS)).split(",")
SPECIALS = {"none": None, "-inf": -torch.inf, "NaN": torch.nan, "+1e4": 1e4, "-1e4": -1e4, "0": 0.0, "+inf": torch.inf}
LAYOUTS = {
    "contiguous": lambda x: x,
    "shifted": lambda x: x[:, 1:],
    "length first": lambda x: x.transpose(0, 1),
    "columns cut": lambda x: x[..., 1:],
    "vocabulary apart": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x[:, ::2],
}


@st.composite
def logits(draw, largest_vocab):
    """(student, teacher) of (B, L, V), related and spoiled in some way."""
    shape = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(2, largest_vocab))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    student, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    student = student * draw(st.sampled_from([0.01, 1.0, 5.0, 30.0]))
    relation = draw(st.sampled_from(["independent", "near", "equal", "opposite"]))
    teacher = {
        "independent": noise * 4,
        "near": student + 1e-3 * noise,
        "equal": student.clone(),
        "opposite": -student,
    }[relation]
    if draw(st.booleans()):  # ties
        student = student.round()
    for x in (student, teacher):
        special = draw(st.sampled_from(list(SPECIALS)))
        if SPECIALS[special] is not None:
            share = draw(st.sampled_from([0.02, 0.5]))
            x[torch.rand(shape, generator=generator) < share] = SPECIALS[special]
    if draw(st.booleans()):  # banned by both
        both = torch.rand(shape, generator=generator) < 0.3
        student[both] = teacher[both] = -torch.inf
    dtype = draw(st.sampled_from(budget.DTYPES))
    layout = draw(st.sampled_from(list(LAYOUTS)))
    event(f"{relation}, {str(dtype)[6:]}")
    student, teacher = (LAYOUTS[layout](x.to(dtype)) for x in (student, teacher))
    assume(student.shape[-1] >= 1)
    return student, teacher


@st.composite
def options_for(draw, vocab):
    return dict(
        divergence=draw(st.sampled_from(reference.DIVERGENCES)),
        beta=draw(st.sampled_from([0.5, 0.05, 0.9])),
        temperature=draw(st.sampled_from([1.0, 0.5, 1.7])),
        teacher_temperature=draw(st.sampled_from([None, 0.7, 2.0])),
        vocab_size=draw(st.none() | st.integers(1, vocab)),
    )


def examples(backend: str) -> settings:
    """A row costs the interpreter 30 ms: fewer there, bar in the thorough run."""
    thorough = settings.default.max_examples >= 2000
    return settings(max_examples=2000 if thorough else 15 if backend == "triton" else 120)


def luck(student, teacher, temperature, teacher_temperature, **_) -> float:
    largest = max((x[x.isfinite()].abs().max().item() for x in (student, teacher) if x.isfinite().any()), default=0.0)
    return min(largest / min(temperature, teacher_temperature or temperature), 256.0) * 2**-24


def widest(backend: str) -> int:
    """Several tiles: of 64 logits in the interpreter, of 2,048 in the C++ kernels."""
    return 150 if backend == "triton" else 4500


@pytest.mark.parametrize("backend", FUZZED)
def test_scores_and_candidates(backend):
    skip_unless_served(backend)

    @examples(backend)
    @given(st.data())
    def check(data):
        student, teacher = data.draw(logits(widest(backend)))
        options = data.draw(options_for(student.shape[-1]))
        limit = options["vocab_size"] or student.shape[-1]
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
        ids = torch.randint(limit, student.shape[:-1], generator=generator)
        device = device_of(backend)
        scores = budget.check_scores(
            backend, student, teacher, ids, device=device, allow_rounding=luck(student, teacher, **options), **options
        )

        mask = torch.rand(ids.shape, generator=generator) < 0.8
        selection = dict(
            num_candidates=data.draw(st.integers(1, 6)),
            criterion=data.draw(st.sampled_from(reference.CRITERIA)),
            threshold=data.draw(st.sampled_from([0.0, 0.3, -1.0])),
        )
        tensors = (x.to(device) for x in (student, teacher, ids, mask))
        same, index = rk.scores_and_candidates(*tensors, **selection, **options, backend=backend)
        for have, want in zip(same, scores, strict=True):
            assert torch.equal(have.nan_to_num(1e9), want.nan_to_num(1e9)), "scores alone and with candidates differ"
        criterion = rk.criterion_score(same, selection["criterion"]).cpu()
        expected = reference.select_tokens(
            criterion, mask, num_tokens=selection["num_candidates"], threshold=selection["threshold"]
        )
        assert torch.equal(index.cpu(), expected), "not the best of the backend's own scores"

        truth = reference.token_scores(
            budget.flat(student.double()), budget.flat(teacher.double()), ids.flatten(), **options
        )
        ideal = reference.criterion_score(truth, selection["criterion"]).view(ids.shape)
        if separated(ideal[mask], selection["threshold"]):
            event("selection separated")
            ideal = reference.select_tokens(
                ideal, mask, num_tokens=selection["num_candidates"], threshold=selection["threshold"]
            )
            assert torch.equal(index.cpu(), ideal), "not the best of the true scores"

    check()


def separated(scores, threshold) -> bool:
    """No two scores, nor a score and the threshold, are so near that rounding may swap them."""
    ordered = torch.cat([scores[scores.isfinite()].double(), torch.tensor([threshold], dtype=torch.float64)]).sort()[0]
    return bool((ordered.diff() > 1e-3 * (1 + ordered[1:].abs())).all())


@pytest.mark.parametrize("backend", FUZZED)
def test_divergence_and_gradient(backend):
    skip_unless_served(backend)

    @examples(backend)
    @given(st.data())
    def check(data):
        student, teacher = data.draw(logits(widest(backend)))
        vocab, num_rows = student.shape[-1], student.shape[0] * student.shape[1]
        options = data.draw(options_for(vocab))
        options["vocab_topk"] = data.draw(st.none() | st.integers(1, vocab + 2))
        options["tail"] = data.draw(st.sampled_from(reference.TAILS))
        rows = None
        if data.draw(st.booleans()):
            rows = torch.tensor(data.draw(st.permutations(range(num_rows)))[: data.draw(st.integers(0, 5))])
            rows = torch.cat([rows.long(), torch.tensor([-1])])
        _, grad = budget.check_divergence(
            backend,
            student,
            teacher,
            rows=rows,
            device=device_of(backend),
            allow_rounding=luck(student, teacher, **options),
            **options,
        )
        if rows is not None:
            others = torch.ones(num_rows, dtype=torch.bool)
            others[rows[rows >= 0]] = False
            assert not budget.flat(grad)[others.to(grad.device)].any(), "a row not named has a gradient"

    check()


@pytest.mark.parametrize("backend", FUZZED)
def test_selection(backend):
    skip_unless_served(backend)

    @examples(backend)
    @given(
        st.lists(
            st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 1e-30, torch.nan, torch.inf, -torch.inf]), max_size=40),
            max_size=3,
        ),
        st.integers(1, 45),
        st.sampled_from([0.0, 1.0, -torch.inf]),
        st.integers(0, 2**16),
    )
    def check(values, num_tokens, threshold, seed):
        length = max((len(row) for row in values), default=0)
        score = torch.tensor([row + [0.5] * (length - len(row)) for row in values]).view(len(values), length)
        mask = torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
        got = rk.select_tokens(
            score.to(device_of(backend)),
            mask.to(device_of(backend)),
            num_tokens=num_tokens,
            threshold=threshold,
            backend=backend,
        )
        for have, row, allowed in zip(got.tolist(), score.tolist(), mask.tolist(), strict=True):
            order = sorted(range(length), key=lambda i: (-row[i], i) if row[i] == row[i] else (torch.inf, i))
            best = [i for i in order if allowed[i] and row[i] > threshold][:num_tokens]
            assert have == best + [-1] * (num_tokens - len(best))

    check()
