"""The self-check: before the first step, on the run's own first prompts, is the model what a step takes it for?

Each question is one that a model, a tokenizer or an adapter of some kind has been seen to answer with no, while the run
went on and its losses looked well. It takes seconds, moves no weight, and leaves the random state as it was.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..answers.completions import rollouts_of
from ..answers.prompts import keeps_text
from ..answers.rollout import Rollouts, generate
from ..models.hidden import completion_hidden
from ..models.parts import captured_hidden
from ..models.sharding import whole
from ..words import named_line
from .checks import embedding_size

ROWS, TOKENS = 4, 8  # of the data, and of an answer
_LONGEST = 64  # tokens of the prompt whose every logit is compared
# Nats a token that rounding may make, in fp32 and in 16 bits.
_MOST, _MOST_16 = 5e-3, 0.1

log = logging.getLogger("rmsd")


class Check(NamedTuple):
    """One question and its answer."""

    name: str
    passed: bool | None  # None: it could not be asked here
    said: str  # what was measured, why it was not asked or, where it failed, cause and remedy

    def __str__(self) -> str:
        return f"{self.name:<24}{ {True: 'ok', False: 'FAILED', None: '-'}[self.passed]:<8}{self.said}"


class SelfCheck(TrainerCallback):
    """Checks when training begins, once all that transformers and accelerate change is changed.

    Raises:
        ValueError: the first check that failed, in one line.
    """

    def __init__(self, trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.self_check:
            return
        for check in self_check(self._trainer):
            log.info("self-check: %s", check)
            if check.passed is False:
                raise ValueError(f"self-check, {check.name}: {check.said} (self_check=false trains all the same)")


def self_check(trainer) -> list[Check]:
    """The checks, in order, of an RMSDTrainer whose model is where it is trained."""
    student, args = trainer.student, trainer.args
    data = trainer.train_dataset
    rows = [data[number] for number in range(min(ROWS, len(data), args.per_device_train_batch_size))]
    read = [(trainer.prompts.student(row), trainer.prompts.teacher(row)) for row in rows]
    prompts = [student_ids for student_ids, _ in read]
    checks = [_ids(trainer, read), _text(trainer, rows, read)]
    if not all(check.passed for check in checks):
        return checks
    was_training = student.training
    student.eval()
    with torch.no_grad(), whole(student), trainer.accelerator.autocast():
        try:
            rollouts = _answers(trainer, rows, prompts)
        except Exception as error:
            return [*checks, _raised("sampled is scored", error, trainer)]
        checks += [
            _asked("padded as alone", _padded, trainer, rollouts),
            _asked("sampled is scored", _sampled, trainer, rollouts),
            _asked("teacher is student", _teacher, trainer, rollouts),
            _asked("head", _head, trainer, prompts),
        ]
    checks.append(_asked("weights move", _moves, trainer, rollouts))
    student.train(was_training)
    return checks


def _asked(name: str, question: Callable[..., Check], trainer, of) -> Check:
    try:
        return question(name, trainer, of)
    except Exception as error:
        return _raised(name, error, trainer)


def _raised(name: str, error: Exception, trainer) -> Check:
    """A model whose own code raises is not served, and its error says in the model's terms why."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    model = type(trainer.student).__name__
    return Check(
        name,
        False,
        f"{model} raises {named_line(error)}: transformers does not run this model so, and it is not served",
    )


def _limit(trainer) -> float:
    low = trainer.args.bf16 or trainer.args.fp16 or trainer.student_head().weight.dtype.itemsize < 4
    return _MOST_16 if low else _MOST


def _ids(trainer, read: list[tuple[list[int], list[int]]]) -> Check:
    size, largest = embedding_size(trainer.student), max(max(ids) for pair in read for ids in pair)
    if largest >= size:
        said = (
            f"prompts hold token id {largest}, the embedding has {size} rows: resize_token_embeddings(len(tokenizer))"
        )
        return Check("ids", False, said)
    return Check("ids", True, f"largest {largest}, embedding of {size}")


def _text(trainer, rows: list[dict], read: list[tuple[list[int], list[int]]]) -> Check:
    tokenizer = trainer.processing_class
    for row, (student, teacher) in zip(rows, read, strict=True):
        for prompt, ids in ((row["prompt"], student), (trainer.prompts.told(row), teacher)):
            if lost := keeps_text(tokenizer, prompt, ids):
                said = f"a prompt's ids do not hold its text {lost[:60]!r}: use the tokenizer that belongs to the model"
                return Check("text", False, said)
    return Check("text", True, "prompts' ids hold their text")


def _answers(trainer, rows: list[dict], prompts: list[list[int]]) -> Rollouts:
    """Brought, or written by the model itself, whoever writes them in the run."""
    if rows[0].get("completion") is not None:
        brought = rollouts_of(rows, prompts, trainer.processing_class, trainer.pad_id, trainer.args.device)
        return brought.of(torch.arange(len(rows)), TOKENS)
    return generate(
        trainer.student,
        prompts,
        max_new_tokens=min(TOKENS, trainer.args.max_completion_length),
        pad_id=trainer.pad_id,
        eos_ids=trainer.eos_ids,
        seed=trainer.args.seed,
    )


def _sampled(name: str, trainer, rollouts: Rollouts) -> Check:
    if trainer.args.engine != "transformers":
        return Check(name, None, "each step holds the engine to the trainer's forward (engine_gap)")
    if rollouts.student_hidden is None:
        return Check(name, None, "rows bring their completions")
    gap = _gap(trainer, rollouts.student_hidden, _read(trainer, rollouts), rollouts.completion_mask)
    return _within(
        name,
        gap,
        _limit(trainer),
        "log-probabilities recorded while sampling are not those of a forward over the finished answers, so the "
        "model's cache is not its forward: set train.per_device_train_batch_size=1 where padding is the cause, or "
        "engine=vllm, or bring rollouts",
    )


def _padded(name: str, trainer, rollouts: Rollouts) -> Check:
    if trainer.args.per_device_train_batch_size == 1:
        return Check(name, None, "one row at a time has no padding")
    one = rollouts.of(torch.tensor([0, 0]))
    context = getattr(trainer.student.config.get_text_config(), "max_position_embeddings", None)
    longer = one.prompt_ids[0] + (one.prompt_ids[0] * 7)[:7]
    if context and len(longer) + one.completion_ids.shape[1] > context:
        return Check(name, None, "the first prompt leaves no room for padding")
    alone = _read(trainer, rollouts.of(torch.tensor([0])))
    one.prompt_ids = [one.prompt_ids[0], longer]
    gap = _gap(trainer, alone, _read(trainer, one)[:1], one.attention_mask[:1])
    return _within(
        name,
        gap,
        _limit(trainer),
        "a row beside a longer one is not read as it is alone, so the model does not heed padding: set "
        "train.per_device_train_batch_size=1 (train.gradient_accumulation_steps makes up for it)",
    )


def _teacher(name: str, trainer, rollouts: Rollouts) -> Check:
    teacher = trainer.teacher
    if teacher.kind == "adapter_off" or teacher.changed or trainer.state.global_step:
        return Check(name, None, "the teacher's weights are others than the student's")
    told = teacher.hidden(rollouts.prompt_ids, rollouts, trainer.pad_id)
    gap = _gap(trainer, _read(trainer, rollouts), told, rollouts.attention_mask, trainer.teacher.head)
    return _within(
        name,
        gap,
        _limit(trainer),
        "under the student's own prompt the teacher's distribution is not the student's, so anchors would be trained "
        f"on: set train.teacher=live, or merge what makes {type(trainer.student).__name__} differ into its weights",
    )


def _head(name: str, trainer, prompts: list[list[int]]) -> Check:
    student = trainer.student
    ids = torch.tensor([min(prompts, key=len)[-_LONGEST:]], device=trainer.args.device)
    with captured_hidden(student) as captured:
        logits = student(input_ids=ids, use_cache=False).logits
    gap = _between(logits, trainer.student_head()(captured[-1])).mean().item()
    return _within(
        name,
        gap,
        _limit(trainer),
        f"logits rebuilt from hidden states are not those of {type(student).__name__}: its head does more than a "
        "product, a scale and a soft cap, and is not served",
    )


def _moves(name: str, trainer, rollouts: Rollouts) -> Check:
    """The gradient of the answers' log-probability, along the way that the loss's takes."""
    student = trainer.student
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return Check(name, None, "weights are in shards")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    student.train()
    with torch.enable_grad(), torch.random.fork_rng(devices), trainer.accelerator.autocast():
        loss = -trainer.student_head()(_read(trainer, rollouts)).float().log_softmax(-1).amax(-1).mean()
        moved = loss.requires_grad and _any_gradient(loss, trained, trainer.accelerator.num_processes == 1)
    if moved:
        return Check(name, True, f"{len(trained)} trained tensors, and a gradient reaches them")
    said = "no gradient reaches a trained weight: with train.gradient_checkpointing set "
    said += "train.gradient_checkpointing_kwargs={use_reentrant: false}; under PEFT call enable_input_require_grads(), "
    return Check(name, False, said + "and see that what is trained (modules, tokens) is used by the first rows")


def _any_gradient(loss: Tensor, trained: list[Tensor], alone: bool) -> bool:
    if not alone:  # DDP's hooks wait for a gradient of each parameter: none of them is called here
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    else:
        loss.backward()
        gradients = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _read(trainer, rollouts: Rollouts) -> Tensor:
    """(B, L, H) of the student, in one forward, padded."""
    return completion_hidden(
        trainer.student,
        rollouts.prompt_ids,
        rollouts.completion_ids,
        rollouts.attention_mask,
        trainer.pad_id,
        one_forward=True,
    )


def _gap(trainer, hidden: Tensor, other: Tensor, mask: Tensor, other_head: Callable | None = None) -> float:
    """Nats a token between two readings, (B, L, H) each."""
    head = trainer.student_head()
    gap = _between(head(hidden), (other_head or head)(other))
    return gap[mask].mean().item() if mask.any() else 0.0


def _between(logits: Tensor, other: Tensor) -> Tensor:
    """(..., V) -> (...): the expected difference of log-probabilities, by size."""
    ours, theirs = (x.float().log_softmax(-1) for x in (logits, other))
    gap = (ours - theirs).abs().where(ours > -torch.inf, 0.0)  # what neither can say, as a padded vocabulary's end
    return (ours.exp() * gap).sum(-1)


def _within(name: str, gap: float, most: float, cause: str) -> Check:
    measured = f"{gap:.1e} nats a token, at most {most:g}"
    return Check(name, True, measured) if gap <= most else Check(name, False, f"{measured}: {cause}")
