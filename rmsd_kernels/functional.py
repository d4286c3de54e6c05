"""The public functions: check the arguments, bring them to (B, L, V), pick a backend, return NamedTuples.

Shapes: `B` sequences, `L` completion length, `N = B*L` rows, `V` vocabulary. A leading shape of (N,) or (B, L) is
accepted everywhere and comes back. Options are keyword-only; scores are fp32; logarithms are natural.
"""

from torch import Tensor

from . import ops, reference
from .backends import resolve_backend
from .checks import check_floating, check_ids, check_logits, check_mask, check_rows, check_selection
from .dispatch import divergence_of_rows, scores_and_candidates_of_rows, scores_of_rows
from .options import complete_options
from .reference import TokenScores


def token_scores(
    student_logits: Tensor,  # (N, V) | (B, L, V)  fp32 | fp16 | bf16 | fp64
    teacher_logits: Tensor,  # same
    sampled_ids: Tensor,  # (N,) | (B, L)  int64
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TokenScores:
    """Log-probabilities of the sampled token, divergence, log-sum-exps and entropies of every row, in one pass.

    Args:
        student_logits, teacher_logits: row i is the distribution that `sampled_ids[i]` was drawn from (shifted).
        sampled_ids: the token the student wrote. One outside the vocabulary raises on a CPU; elsewhere, where looking
            would make the host wait, its row is NaN throughout.
        divergence: "reverse_kl" KL(p||q), "forward_kl" KL(q||p) or "jsd", p the student, q the teacher.
        beta: the teacher's weight in the jsd's mixture, strictly between 0 and 1.
        temperature, teacher_temperature: logits are divided by these first; the teacher's defaults to the student's.
        vocab_size: columns that are real, for a padded vocabulary; the rest is ignored.
        backend: "auto", "triton", "cpu" or "torch".

    Returns:
        TokenScores, each of `sampled_ids`' shape, fp32, in nats. A row holding NaN or +inf, or no finite logit, is
        NaN throughout. Not differentiable; see `token_divergence`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    check_logits(student_logits, teacher_logits)
    options = complete_options(
        "token_scores",
        student_logits,
        student_logits.shape[-1],
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        backend=backend,
    )
    check_ids(sampled_ids, student_logits.shape[:-1], student_logits.device, options.vocab_size)
    return scores_of_rows(student_logits, teacher_logits, sampled_ids, options)


def select_tokens(
    score: Tensor,  # (B, L) floating
    mask: Tensor,  # (B, L) bool
    *,
    num_tokens: int,
    threshold: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Positions of each row's `num_tokens` largest scores among `mask & (score > threshold)`.

    Returns:
        (B, num_tokens) int64, best first, -1 where fewer qualify. Ties go to the earlier position; NaN never qualifies.

    Raises:
        TypeError, ValueError: as in `token_scores`.
    """
    check_floating(score=score)
    if score.ndim != 2:
        raise ValueError(f"score must be (B, L), not {tuple(score.shape)}")
    check_mask(mask, score.shape, score.device)
    check_selection(num_tokens=num_tokens, threshold=threshold)
    backend = resolve_backend(backend, score, "select_tokens")
    if backend == "torch":
        return reference.select_tokens(score, mask, num_tokens=num_tokens, threshold=threshold)
    return ops.select(score.detach().float().contiguous(), mask.contiguous(), num_tokens, threshold, backend)


def scores_and_candidates(
    student_logits: Tensor,  # (B, L, V)  fp32 | fp16 | bf16 | fp64
    teacher_logits: Tensor,  # same
    sampled_ids: Tensor,  # (B, L) int64
    mask: Tensor,  # (B, L) bool: positions that may be selected
    *,
    num_candidates: int = 20,
    criterion: str = "logprob_gap",
    threshold: float = 0.0,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> tuple[TokenScores, Tensor]:
    """`token_scores`, and each sequence's `num_candidates` positions with the largest criterion above `threshold`.

    Args:
        criterion: "logprob_gap" |log q(y) - log p(y)|, "divergence", or "entropy_gap" |H(q) - H(p)|.
        mask: true on tokens the student wrote; ids at other positions are not checked.

    The other options are those of `token_scores`.

    Returns:
        TokenScores of (B, L), and index (B, num_candidates) int64 as `select_tokens` gives it. A row whose divergence
        is not finite is never selected.

    Raises:
        TypeError, ValueError: as in `token_scores`.
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.ndim != 3:
        raise ValueError(f"student_logits must be (B, L, V), not {tuple(student_logits.shape)}")
    options = complete_options(
        "scores_and_candidates",
        student_logits,
        student_logits.shape[-1],
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        backend=backend,
    )
    check_selection(criterion=criterion, num_tokens=num_candidates, threshold=threshold, name="num_candidates")
    check_mask(mask, student_logits.shape[:-1], student_logits.device)
    check_ids(sampled_ids, student_logits.shape[:-1], student_logits.device, options.vocab_size, mask)
    return scores_and_candidates_of_rows(
        student_logits, teacher_logits, sampled_ids, mask, num_candidates, criterion, threshold, options
    )


def token_divergence(
    student_logits: Tensor,  # (N, V) | (B, L, V)  fp32 | fp16 | bf16 | fp64
    teacher_logits: Tensor,  # same
    *,
    rows: Tensor | None = None,  # (R,) int64
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    vocab_topk: int | None = None,
    tail: str = "bucket",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of every row in nats, differentiable in `student_logits`: once, and again with backend="torch" alone.

    Args:
        rows: only these rows of the flattened leading axis, -1 standing for none. The others' logits get exactly zero
            gradient and are never read; a row that is named more than once gets the sum of all its gradients.
        vocab_topk: sum over the student's this many largest logits only (ties to the lower id); None for all.
        tail: what happens to the rest of the mass: "bucket" (one more entry holds it: never negative, 0 only where the
            coarsened distributions agree), "renorm" (both renormalised over the k) or "drop" (left out: not a
            divergence; its reverse KL may be negative, and descent on it moves mass out of the k).

    The other options are those of `token_scores`.

    Returns:
        fp32 of the leading shape, or (R,) with `rows`, 0 where the row is -1; fp64 for fp64 logits. NaN for a row
        that is no distribution, +inf where the divergence is; such a row gets zero gradient.

    Raises:
        TypeError, ValueError: as in `token_scores`; a row outside the leading axis raises on a CPU, and is NaN by the
            GPU's kernels.
        RuntimeError: for a second derivative of the kernels, in its backward; for one by `torch.func`, in the call.
    """
    check_logits(student_logits, teacher_logits)
    options = complete_options(
        "token_divergence",
        student_logits,
        student_logits.shape[-1],
        divergence=divergence,
        beta=beta,
        vocab_topk=vocab_topk,
        tail=tail,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        backend=backend,
    )
    leading = student_logits.shape[:-1]
    if rows is not None:
        check_rows(rows, leading.numel(), student_logits.device)
    result = divergence_of_rows(student_logits, teacher_logits, rows, options)
    return result.view(leading) if rows is None else result
