"""A head split over 1, 2 and 4 ranks gives what the whole one gives: scores, divergences, gradients, refusals."""

import functools
import re

import pytest
import sharded
import torch
from budget import assert_within_budget, plain_torch, rounding_of
from sharded import NAMES, ROWS, SHARDS, UPSTREAM, V, sampled_ids

import rmsd_kernels
from rmsd_kernels.heads import topk
from rmsd_kernels.options import complete_options
from rmsd_kernels.reference import TokenScores, token_divergence, token_scores

CASES = sharded.cases()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed: install a torch built with it")
    return sharded.run(tmp_path_factory.mktemp("ranks"))


@functools.cache
def whole(name: str, dtype: torch.dtype):
    """Scores, divergence and gradients of the unsharded head, by the specification."""
    inputs, options = CASES[name]
    made = {name: tensor.to(dtype) for name, tensor in sharded.MADE[inputs]().items()}
    head = dict(logit_scale=options.get("logit_scale", 1.0), softcap=options.get("softcap"))
    options = {name: value for name, value in options.items() if name not in ("workspace_mb", "backend", *head)}
    scoring = {name: value for name, value in options.items() if name not in ("vocab_topk", "tail")}

    def logits(made):
        return [
            made[f"{role}_hidden"] @ made[f"{role}_weight"].T + made[f"{role}_bias"] for role in ("student", "teacher")
        ]

    def divergence(made):
        return token_divergence(*logits(made), **options, **head)[ROWS.clamp_min(0)].where(ROWS >= 0, 0.0)

    scores = token_scores(*logits(made), sampled_ids(options.get("vocab_size", V)), **scoring, **head)
    result = divergence(made)
    # A row that is not finite has no gradient, and autograd would multiply that 0 by its hidden state's NaN.
    hidden = made["student_hidden"]
    leaves = {**made, "student_hidden": torch.where(hidden.isnan(), 0.0, hidden)}
    wanted = [leaves[name].requires_grad_() for name in NAMES]
    upstream = UPSTREAM.to(dtype).where(result.isfinite(), 0.0)
    return scores, result, torch.autograd.grad(divergence(leaves), wanted, upstream)


@pytest.mark.parametrize(("name", "world"), [(name, world) for name in CASES for world in sharded.worlds(name)])
def test_shards_give_what_the_whole_head_gives(name, world, ranks):
    inputs, _ = CASES[name]
    dtype = sharded.MADE[inputs]()["student_weight"].dtype
    with plain_torch(stable=False):
        plain_scores, plain, plain_grads = whole(name, torch.float32)
    scores, truth, grads = whole(name, torch.float64)
    got = [ranks[rank][world, name] for rank in range(world)]
    for rank in range(world):
        for field, have, first in zip(TokenScores._fields, got[rank]["scores"], got[0]["scores"], strict=True):
            assert have.dtype == torch.float32
            assert have.nan_to_num(7.0).equal(first.nan_to_num(7.0)), f"{field} differs between ranks"
            want = getattr(scores, field)
            assert_within_budget(have, getattr(plain_scores, field), want, field, rounding_of(want, torch.float32))
        assert_within_budget(got[rank]["divergence"], plain, truth, "divergence", rounding_of(truth, torch.float32))
    by_hidden = [seen["grads"][0] for seen in got]
    assert all(grad.equal(by_hidden[0]) for grad in by_hidden), "every rank has the whole gradient, to the bit"
    sharded_grads = (by_hidden[0], *(torch.cat([seen["grads"][i] for seen in got]) for i in (1, 2)))
    for field, have, plain_grad, want in zip(NAMES, sharded_grads, plain_grads, grads, strict=True):
        assert have.dtype == dtype
        assert_within_budget(have, plain_grad.to(dtype), want, f"gradient by {field}", rounding_of(want, dtype))


@pytest.mark.parametrize("world", SHARDS)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("fp64")])
def test_the_merge_is_exact(name, world, ranks):
    """In fp64 nothing hides behind a budget made for fp32."""
    _, truth, grads = whole(name, torch.float64)
    got = [ranks[rank][world, name] for rank in range(world)]
    torch.testing.assert_close(got[-1]["divergence"], truth.detach(), rtol=1e-11, atol=1e-12)
    joined = (got[0]["grads"][0], *(torch.cat([seen["grads"][i] for seen in got]) for i in (1, 2)))
    for have, want in zip(joined, grads, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-11)


def test_a_rest_whose_mass_underflows_has_its_gradient_of_a_forward_kl():
    """p_j Q / P, where p_j and P are e^-100 and the teacher's Q is not."""
    student, teacher = torch.tensor([[3.0, 0.0, *range(-100, -110, -1)]]), torch.linspace(-1, 1, 12).view(1, -1)
    wanted = dict(divergence="forward_kl", vocab_topk=2)
    options = complete_options("a test", student, 12, **wanted)
    shards = [(student[:, part], teacher[:, part]) for part in (slice(6), slice(6, 12))]
    sent = [topk.shard_candidates(*shard, 2, 2, options) for shard in shards]
    merged = topk.MergedTopK(torch.stack([partial for partial, _ in sent]).double(), [2, 2], options)
    got = [
        topk.shard_topk_gradient(
            shards[i][0], merged.student_lse, merged.by_other[:, i], merged.by_candidate[:, i], sent[i][1], options
        )
        for i in range(2)
    ]
    exact = student.double().requires_grad_()
    (want,) = torch.autograd.grad(token_divergence(exact, teacher.double(), **wanted).sum(), exact)
    torch.testing.assert_close(torch.cat(got, -1), want.float())


def test_cases_hold_what_they_are_for():
    """Infinite and NaN divergences occur, and so do supports that end inside a tie."""
    finite = {name: whole(name, torch.float64)[1].isfinite() for name in CASES}
    assert not finite["teacher_shard_banned-reverse_kl-None"][0]
    assert finite["student_shard_banned-reverse_kl-None"].all()
    assert not finite["teacher_banned_where_student_underflows-reverse_kl-None"][0]
    assert finite["nan_row-reverse_kl-None"].tolist() == [False] + [True] * (len(ROWS) - 1)
    made = sharded.tied()
    logits = made["student_hidden"] @ made["student_weight"].T + made["student_bias"]
    top = logits.sort(descending=True).values
    assert (top[:, 9] == top[:, 10]).any()


# ---- what is communicated ------------------------------------------------------------------------------------------

N = sharded.N
HANDSHAKE = [("all_gather", 32)]  # a call, whatever its rows
GRADIENT = [("all_reduce", N * sharded.H * 4)]


@pytest.mark.parametrize("world", SHARDS)
@pytest.mark.parametrize(
    ("name", "traffic"),
    {
        "scores": [28 * N],
        "scores-jsd": [28 * N, 4 * N],
        "divergence": [12 * N, 16 * N],  # the second in the backward
        "divergence-jsd": [12 * N, 4 * N, 16 * N],
        "divergence-topk": [(32 + 8 * 4) * N],
        "frozen decoder": [12 * N, 16 * N],
    }.items(),
)
def test_a_token_costs_at_most_64_bytes(name, traffic, world, ranks):
    expected = HANDSHAKE + [("all_gather", size) for size in traffic]
    if "divergence" in name:
        expected = expected + GRADIENT
    for rank in range(world):
        assert ranks[rank][world, "traffic", name] == expected
    assert sum(traffic) <= 64 * N


def test_the_logits_of_all_rows_never_exist(ranks):
    assert ranks[0]["largest"] <= 2**20 / 4 < 600 * 2000 / 4


# ---- refusals ------------------------------------------------------------------------------------------------------

MESSAGES = {
    "student_weight": r"student_weight must be \(V, 8\)",
    "teacher_weight": r"teacher_weight must have student_weight's vocabulary 43, not 42",
    "teacher_hidden": r"teacher_hidden must have student_hidden's dtype",
    "student_bias": r"student_bias must be \(43,\)",
    "sampled_ids": r"sampled_ids must lie in \[0, 120\), not 120",
    "sampled_ids_negative": r"sampled_ids must lie in",
    "temperature": r"temperature must be the same on every rank, not 1.0 on 0 and 2.0 on 1",
    "student_hidden": r"student_hidden must be the same on every rank",
    "backend": r"backend must be",
    "vocab_size": r"vocab_size must lie between 1 and",
    "divergence": r"divergence must be one of",
}


@pytest.mark.parametrize("name", sharded.SPOILED)
def test_bad_arguments_of_one_rank_are_refused_on_both(name, ranks):
    for rank in range(2):
        kind, message = ranks[rank]["refused", name]
        assert kind == ("TypeError" if name == "teacher_hidden" and rank == 1 else "ValueError")
        assert re.search(MESSAGES[name], message), message
        assert "\n" not in message


def test_a_process_outside_the_group_is_refused(ranks):
    assert all("group must be one that this process belongs to" in ranks[rank]["outsider"] for rank in (2, 3))


def test_without_a_process_group_the_whole_head_functions_are_named():
    tensors, biases = sharded.positional(sharded.base())
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised.*linear_token_scores"):
        rmsd_kernels.vocab_parallel_linear_token_scores(*tensors, sampled_ids(), **biases)
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised"):
        rmsd_kernels.vocab_parallel_linear_token_divergence(*tensors, **biases)


@pytest.mark.parametrize("world", SHARDS)
def test_no_rows_still_belong_to_the_graph(world, ranks):
    for rank in range(world):
        result, grad, divergence = ranks[rank][world, "no rows"]
        assert result.shape == (0,) == divergence.shape
        assert not grad.any()
