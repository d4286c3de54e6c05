"""Score: from answers to candidates, by one of two routes.

The trainer's own forwards read every answer with both models (`scored_by_forwards`), or the engine records what both
models say of its tokens (`scored_by_engine`). Both take the step's micro-batches as they are written, fill in `scores`,
`candidates` and `wishes`, and yield each as soon as the judge can be asked about it.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rmsd_kernels import TokenScores, linear_token_scores, select_tokens

from ..answers.engines import Engine, engine_gap
from ..answers.rollout import Recorded, hidden_states
from ..answers.teacher import Teacher
from ..criteria import scored_by
from ..loss import LinearRMSDLoss
from ..models.heads import OutputHead, Reading, head_options
from ..models.transfer import to_device
from .micro_batch import MicroBatch, TrainPart
from .wishes import Logprobs, recorded_wishes, wishes


def scored_by_forwards(
    written: Iterable[MicroBatch],
    student: nn.Module,
    student_head: OutputHead,
    teacher: Teacher,
    loss: LinearRMSDLoss,
    pad_id: int,
    temperature: float = 1.0,
    vocab_topk: int | None = None,
    per_turn: bool = False,
) -> Iterator[MicroBatch]:
    """Both models read every answer, as soon as it is written: all scores of every token, both models' whole
    distributions at the candidates, and the hidden states that the loss needs of the teacher."""
    for batch in written:
        rollouts = batch.rollouts
        rollouts.student_hidden = hidden_states(student, rollouts, pad_id)
        batch.teacher_hidden, contrast_hidden = _read_by_teacher(batch, teacher, pad_id)
        readings = Reading(rollouts.student_hidden, student_head), Reading(batch.teacher_hidden, teacher.head)
        mask = rollouts.completion_mask
        batch.scores, batch.candidates = score(loss, *readings, rollouts.completion_ids, mask)
        if per_turn:
            batch.candidates = of_each_turn(loss, scored_by(loss.criterion, batch.scores, mask), mask)
        batch.wishes = wishes(
            *readings,
            batch.candidates,
            temperature,
            vocab_topk,
            contrast_hidden=contrast_hidden,
            completion_ids=rollouts.completion_ids,
        )
        written_by_engine = rollouts.recorded and rollouts.on_host.completion_mask.any()  # not where all episodes died
        if written_by_engine and temperature == 1.0:
            ours = batch.scores.student_logprob[mask]
            batch.engine_gaps["engine_gap"] = engine_gap(rollouts.recorded.logprob[mask], ours)
        yield batch


def scored_by_engine(
    written: Iterable[MicroBatch], engine: Engine, teacher: Teacher, loss: LinearRMSDLoss, per_turn: bool = False
) -> Iterator[MicroBatch]:
    """The engine records the student's log-probabilities as it writes, then takes the teacher's weights and records
    theirs as it reads: no forward of the student, and one of the teacher over what is kept, once the judge has
    answered. All micro-batches are written before the first is read, so that weights change once a step."""
    batches = list(written)
    for batch in batches:
        if batch.rollouts.recorded is None:  # the rows' own completions, or some that the teacher wrote
            batch.rollouts.recorded = engine.read(batch.prompt_ids, batch.rollouts)
    if teacher.kind != "live":
        with teacher.active() as model:
            engine.sync(model)
    for batch in batches:
        rollouts = batch.rollouts
        student, told = rollouts.recorded, engine.read(batch.teacher_prompt_ids, rollouts)
        batch.scores = Logprobs(student.logprob, told.logprob)
        batch.candidates = widest_gaps(loss, *batch.scores, rollouts.completion_mask, per_turn)
        contrast = _recorded_contrast(batch, engine)
        batch.wishes = recorded_wishes(student, told, rollouts.completion_ids, batch.candidates, contrast)
        yield batch


def _read_by_teacher(batch: MicroBatch, teacher: Teacher, pad_id: int) -> tuple[Tensor, Tensor | None]:
    """(B, L, H) under the teacher's prompts, and under the contrast prompts: NaN for rows that have none. Both readings
    go into the same forwards, in which answers of like length stand together whatever their prompts."""
    rollouts, at = batch.rollouts, batch.contrasted
    if not at:
        return teacher.hidden(batch.teacher_prompt_ids, rollouts, pad_id), None
    size = len(batch.rows)
    twice = rollouts.of(torch.tensor([*range(size), *at]))
    prompt_ids = [*batch.teacher_prompt_ids, *(batch.contrast_prompt_ids[i] for i in at)]
    hidden = teacher.hidden(prompt_ids, twice, pad_id)
    contrast = torch.full_like(hidden[:size], torch.nan)
    contrast[to_device(at, hidden.device)] = hidden[size:]
    return hidden[:size].clone(), contrast  # the first is held until the step has trained, the whole need not be


def _recorded_contrast(batch: MicroBatch, engine: Engine) -> Recorded | None:
    """What the engine says under the contrast prompts: NaN for rows that have none."""
    if not (at := batch.contrasted):
        return None
    read = engine.read([batch.contrast_prompt_ids[i] for i in at], batch.rollouts.of(torch.tensor(at)))
    found = []
    for tensor in read:
        whole = tensor.new_full((len(batch.rows), *tensor.shape[1:]), torch.nan if tensor.is_floating_point() else 0)
        whole[to_device(at, tensor.device)] = tensor
        found.append(whole)
    return Recorded(*found)


def score(
    loss: LinearRMSDLoss,
    student: Reading,  # of B answers of L tokens
    teacher: Reading,
    completion_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) bool
) -> tuple[TokenScores, Tensor]:
    """TokenScores of (B, L) and candidates (B, T), -1 for none."""
    options = head_options(student, teacher)
    return loss.candidates(*student.linear, *teacher.linear, completion_ids, completion_mask, **options)


def widest_gaps(
    loss: LinearRMSDLoss,
    student_logprob: Tensor,  # (B, L) fp32
    teacher_logprob: Tensor,  # (B, L) fp32
    completion_mask: Tensor,  # (B, L) bool
    per_turn: bool = False,
) -> Tensor:
    """Candidates (B, T), -1 for none, by the criterion logprob_gap from log-probabilities alone."""
    gap = (teacher_logprob - student_logprob).abs()
    gap = gap.where(gap.isfinite(), torch.nan)  # never qualifies
    if per_turn:
        return of_each_turn(loss, gap, completion_mask)
    return select_tokens(gap, completion_mask, num_tokens=loss.num_candidates, threshold=loss.threshold)


def turns_of(completion_mask: Tensor) -> Tensor:
    """(B, L) bool -> (B, L) int64: which of the student's turns a token belongs to, from 1; 0 where it wrote none. A
    turn is what it wrote in one go, between what it read."""
    before = torch.nn.functional.pad(completion_mask[:, :-1], (1, 0)) if completion_mask.shape[1] else completion_mask
    return (completion_mask & ~before).cumsum(1) * completion_mask


def of_each_turn(
    loss: LinearRMSDLoss,
    criterion: Tensor,  # (B, L) fp32
    completion_mask: Tensor,  # (B, L) bool
) -> Tensor:
    """Candidates (B, turns * T), -1 for none: T of each turn at most, the best of every turn first, then each one's
    second: whoever takes the first few takes as many of each."""
    turns = turns_of(completion_mask)
    options = dict(num_tokens=loss.num_candidates, threshold=loss.threshold)
    each = range(1, int(turns.max()) + 1 if turns.numel() else 1)
    found = [select_tokens(criterion, turns == turn, **options) for turn in each]
    return torch.stack(found, 2).flatten(1) if found else turns.new_full((len(turns), 1), -1)


@torch.no_grad()
def kept_engine_gaps(
    batch: MicroBatch, part: TrainPart, student: Reading, teacher: Reading, loss: LinearRMSDLoss
) -> dict[str, float]:
    """What `scored_by_engine` can be held to: its log-probabilities of a part's kept tokens beside those of the two
    models' readings of that part, by which they are trained. Empty where nothing is kept.

    Raises:
        RuntimeError: as `engine_gap`, by name of the model whose weights the engine did not hold.
    """
    if not part.keep.any():
        return {}
    device = batch.rollouts.completion_ids.device
    b, i = (to_device(index, device) for index in part.keep.nonzero(as_tuple=True))
    sequence = to_device(part.sequences, device)[b]
    student, teacher = student.at(b, i), teacher.at(b, i)
    ours = linear_token_scores(
        *student.linear,
        *teacher.linear,
        batch.rollouts.completion_ids[sequence, i],
        **head_options(student, teacher),
        **loss.score_options,
    )
    engine = Logprobs(*(logprob[sequence, i] for logprob in batch.scores))
    return {
        "engine_gap": engine_gap(engine.student_logprob, ours.student_logprob),
        "engine_teacher_gap": engine_gap(engine.teacher_logprob, ours.teacher_logprob, "teacher"),
    }
