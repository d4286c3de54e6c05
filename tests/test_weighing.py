"""What a token weighs: kept ones by their gap, and those that are not kept by how far they leave the untold teacher."""

import pytest
import tiny
import torch
from tiny import trainer

import rmsd.loss
from rmsd import LinearRMSDLoss, RMSDConfig, RMSDLoss
from rmsd.step.training import gap_weights, unkept_of
from rmsd.training.record import RunRecord, read_lines
from rmsd_kernels import token_divergence


def test_what_is_held_is_what_was_written_before_the_last_kept_token_and_not_kept():
    keep = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    written = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert unkept_of(keep, written).tolist() == [[True, False, False, False, False], [False] * 5]


def test_the_loss_is_that_of_the_kept_tokens_and_the_weight_times_that_of_the_others(tmp_path):
    """By the plain losses of whole logits, the student having moved away from its teacher."""
    found = {}
    for weight in (0.0, 0.5):
        made = trainer(tmp_path, num_kept=1, unkept_kl=weight)
        with torch.no_grad():
            for parameter in made.student.parameters():
                parameter.mul_(3.0)
        inputs, sequences = made.get_batch_samples(iter([tiny.ROWS]), 1, made.args.device)
        batch = inputs[0]["micro_batch"]
        parts = [
            made.compute_loss(made.student, batch.inputs(part), num_items_in_batch=sequences) for part in batch.parts
        ]
        found[weight] = sum(parts).item()
    assert batch.keep.any()

    def logits(model, prompt_ids):
        rows = []
        for prompt, answer in zip(prompt_ids, batch.rollouts.completion_ids.tolist(), strict=True):
            rows.append(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
        return torch.stack(rows)

    mask = batch.rollouts.completion_mask
    loss = RMSDLoss(vocab_topk=None)
    student = logits(made.student, batch.prompt_ids)
    told, untold = (logits(made.teacher.model, ids) for ids in (batch.teacher_prompt_ids, batch.prompt_ids))
    ids = batch.rollouts.completion_ids
    kept = loss(student, told, ids, mask, batch.keep, num_sequences=sequences)
    held = loss(student, untold, ids, mask, unkept_of(batch.keep, mask), num_sequences=sequences)
    assert held > 0.01
    assert found[0.0] == pytest.approx(kept.item(), rel=1e-4)
    assert found[0.5] == pytest.approx((kept + 0.5 * held).item(), rel=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_it_is_in_the_log_and_holds_the_more_the_more_it_weighs(tmp_path, every):
    """The mean over an entry's steps; a weight next to nothing only measures it."""
    entries = {}
    for weight in (0.0, 1e-9, 5.0):
        folder = tmp_path / f"{weight}-{every}"
        options = dict(num_kept=1, max_steps=6, learning_rate=1e-3, unkept_kl=weight, logging_steps=every)
        trainer(folder, callbacks=[RunRecord(folder)], **options).train()
        entries[weight] = read_lines(folder / "metrics.jsonl")
    assert "unkept_kl" not in entries[0.0][0]
    assert len(entries[5.0]) == 6 // every and all(line["unkept_kl"] >= 0 for line in entries[5.0])
    if every == 1:
        assert entries[5.0][0]["unkept_kl"] == pytest.approx(0.0, abs=1e-4), "nothing has moved yet"
        measured, held = (sum(line["unkept_kl"] for line in entries[weight]) for weight in (1e-9, 5.0))
        assert held < 0.6 * measured


def test_a_negative_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unkept_kl must be at least 0, not -1"):
        RMSDConfig(output_dir=str(tmp_path), use_cpu=True, unkept_kl=-1)


@pytest.mark.parametrize("linear", [False, True])
def test_a_kept_tokens_weight_is_a_factor_on_its_divergence(linear):
    student, teacher = torch.randn(2, 2, 4, 30)
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    keep = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]]).bool()
    weights = torch.tensor([[0.5, 9.0, 2.0, 9.0], [9.0, 9.0, 0.25, 9.0]])
    each = token_divergence(student, teacher)
    expected = ((0.5 * each[0, 0] + 2.0 * each[0, 2]) / 2 + 0.25 * each[1, 2]) / 2
    if linear:
        eye = torch.eye(30)
        loss = LinearRMSDLoss(vocab_topk=None)(student, eye, teacher, eye, ids, mask, keep, weights=weights)
    else:
        loss = RMSDLoss(vocab_topk=None)(student, teacher, ids, mask, keep, weights=weights)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match=r"weights must be \(2, 4\), one a token, not \(2, 3\)"):
        RMSDLoss()(student, teacher, ids, mask, keep, weights=weights[:, :3])


def test_gap_weight_is_the_sigmoid_of_the_gap_at_the_part_s_tokens(tmp_path):
    made = trainer(tmp_path, num_kept=1, gap_weight=2.0)
    inputs, _ = made.get_batch_samples(iter([tiny.ROWS]), 1, made.args.device)
    batch = inputs[0]["micro_batch"]
    gap = batch.scores.teacher_logprob - batch.scores.student_logprob
    for part in batch.parts:
        weights = gap_weights(batch, part, 2.0)
        assert weights.shape == part.keep.shape and gap_weights(batch, part, None) is None
        torch.testing.assert_close(weights, (2.0 * gap[part.sequences, : weights.shape[1]]).sigmoid())
    seen = []
    forward = made.loss.forward

    def noted(*heads, weights, **options):
        seen.append(weights)
        return forward(*heads, weights=weights, **options)

    made.loss.forward = noted
    made.train()
    assert seen and all(weights is not None for weights in seen)


def test_the_forward_kl_is_added_where_the_teacher_is_unsure(tmp_path):
    def loss_and_batch(**options):
        made = trainer(tmp_path, num_kept=3, max_steps=1, **options)
        inputs, count = made.get_batch_samples(iter([tiny.ROWS]), 1, made.args.device)
        batch = inputs[0]["micro_batch"]
        each = (
            made.compute_loss(made.model, part, num_items_in_batch=count) for part in map(batch.inputs, batch.parts)
        )
        return float(sum(each)), batch

    plain, batch = loss_and_batch()
    forward, _ = loss_and_batch(divergence="forward_kl")
    everywhere, nowhere = (loss_and_batch(forward_kl_above=above)[0] for above in (-1.0, 1e9))
    assert nowhere == plain and everywhere == pytest.approx(plain + forward, rel=1e-5)
    half = batch.scores.teacher_entropy[batch.keep].median().item()
    assert plain < loss_and_batch(forward_kl_above=half)[0] < everywhere


def test_tokens_that_the_forward_kl_leaves_out_are_counted_and_no_less_after_a_resume(tmp_path, monkeypatch):
    divergence = rmsd.loss.linear_token_divergence

    def poisoned(*heads, **options):
        return divergence(*heads, **options) * (float("inf") if options["divergence"] == "forward_kl" else 1.0)

    monkeypatch.setattr("rmsd.loss.linear_token_divergence", poisoned)
    options = dict(forward_kl_above=-1.0, save_strategy="steps", save_steps=1)
    made = [trainer(tmp_path, **options), trainer(tmp_path, **options)]
    made[0].train()
    made[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for each in made:
        first, second = (entry for entry in each.state.log_history if "loss" in entry)
        assert first["nonfinite_rows"] == first["kept_tokens"] > 0
        assert second["nonfinite_rows"] == first["kept_tokens"] + second["kept_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(forward_kl_above=float("nan")), "must be a finite number or null"),
        (dict(forward_kl_above=1.0, divergence="forward_kl"), "this is it already"),
        (dict(forward_kl_above=1.0, engine="vllm", engine_scores=True), "engine_scores leaves unknown"),
    ],
)
def test_where_it_cannot_be_added_the_run_does_not_begin(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RMSDConfig(output_dir=str(tmp_path), use_cpu=True, **options)
