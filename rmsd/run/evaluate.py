"""Was the behaviour learned, does it stay where it belongs, and how far has the model moved?"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rmsd_kernels import linear_token_scores

from ..answers.episodes import Episodes
from ..answers.prompts import Prompts, encode
from ..answers.rollout import Rollouts, eos_ids_of, generate, pad_id_of
from ..models.heads import OutputHead, Reading, head_options
from ..models.hidden import completion_hidden
from ..tasks import Task
from .solving import Solving


class Evaluator:
    """Holds the base model's own answers to the unrelated prompts, against which drift is measured.

    Metrics:
        <grader>_greedy, <grader>_sampled: share of answers to held-out target prompts that pass each of the task's
            graders, decoded greedily and sampled (`samples` answers a prompt).
        specificity: share of greedy answers to unrelated prompts that do not show the behaviour.
        solved_<how>, turns_<how>, tokens_<how>, tool_errors_<how>: of a task with an environment (solving.Solving),
            greedy or sampled.
        drift: mean KL(base || student) per token, in nats, over the base model's greedy answers to unrelated prompts.
        score: the first grader's greedy share, or the share solved, x specificity x exp(-drift): what is learned, less
            what is forgotten.
    """

    def __init__(
        self,
        base,
        tokenizer,
        task: Task,
        *,
        samples: int = 4,
        temperature: float = 0.5,
        max_new_tokens: int = 24,
        batch_size: int = 16,
        seed: int = 0,
        autocast: Callable = contextlib.nullcontext,  # of mixed precision: the base answers before accelerate is there
        episodes: Episodes | None = None,  # of the task's environment
        prompts: Prompts | None = None,  # as the episodes' are made
    ):
        self.tokenizer, self.task = tokenizer, task
        self.samples, self.temperature = samples, temperature
        self.max_new_tokens, self.batch_size, self.seed = max_new_tokens, batch_size, seed
        self._autocast = autocast
        self.eos_ids = eos_ids_of(base, tokenizer)
        self.pad_id = pad_id_of(tokenizer, self.eos_ids)
        self.target_ids = [encode(tokenizer, prompt) for prompt in task.target_prompts]
        self.unrelated_ids = [encode(tokenizer, prompt) for prompt in task.unrelated_prompts]
        self.solving = None
        if episodes is not None:
            self.solving = Solving(
                episodes,
                task.requests,
                autocast,
                max_new_tokens=max_new_tokens,
                pad_id=self.pad_id,
                eos_ids=self.eos_ids,
                batch_size=batch_size,
                seed=seed,
                prompts=prompts,
            )
        # A copy: the base model is often the very one that training is about to change.
        head = OutputHead.of(base)
        bias = None if head.bias is None else head.bias.detach().clone()
        self.base_head = head._replace(weight=head.weight.detach().clone(), bias=bias)
        self.base_rollouts = list(self._answers(base, self.unrelated_ids))

    @torch.no_grad()
    def __call__(self, model) -> dict[str, float]:
        was_training = model.training
        model.eval()
        greedy = self._texts(model, self.target_ids)
        sampled = self._texts(model, self.target_ids * self.samples, self.temperature) if self.samples else []
        unrelated = self._texts(model, self.unrelated_ids)
        metrics = {}
        if self.solving is not None:
            metrics |= self.solving(model, "greedy")
            if self.samples:
                metrics |= self.solving(model, "sampled", self.temperature, self.samples)
        for name, grader in self.task.graders.items():
            metrics[f"{name}_greedy"] = _share(map(grader, greedy))
            if sampled:
                metrics[f"{name}_sampled"] = _share(map(grader, sampled))
        metrics["specificity"] = 1.0 - _share(map(self.task.leaks, unrelated))
        metrics["drift"] = self._drift(model)
        target = metrics[f"{'solved' if self.solving else next(iter(self.task.graders))}_greedy"]
        metrics["score"] = target * metrics["specificity"] * math.exp(-metrics["drift"])
        model.train(was_training)
        return metrics

    def told(self, model) -> dict[str, float]:
        """What the model solves of a task with an environment when it is told: the teacher, if it is the base model."""
        return {} if self.solving is None else self.solving(model, "greedy", told=True)

    def _answers(self, model, prompt_ids: Sequence[list[int]], temperature: float = 0.0):
        for start in range(0, len(prompt_ids), self.batch_size):
            with self._autocast():
                rollouts = generate(
                    model,
                    prompt_ids[start : start + self.batch_size],
                    max_new_tokens=self.max_new_tokens,
                    pad_id=self.pad_id,
                    eos_ids=self.eos_ids,
                    temperature=temperature,
                    seed=self.seed + start,
                )
            yield rollouts

    def _texts(self, model, prompt_ids, temperature: float = 0.0) -> list[str]:
        return [
            self.tokenizer.decode(ids[mask], skip_special_tokens=True)
            for rollouts in self._answers(model, prompt_ids, temperature)
            for ids, mask in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
        ]

    def _drift(self, model) -> float:
        head = OutputHead.of(model)
        total, tokens = 0.0, 0
        for base in self.base_rollouts:
            divergence = self._base_to_student(model, head, base)
            total += divergence.sum().item()
            tokens += len(divergence)
        return total / max(tokens, 1)

    def _base_to_student(self, model, head: OutputHead, base: Rollouts) -> Tensor:
        """Of every token of the base model's answers, in one row."""
        # The base model may have answered on another device than the one that the student is on since.
        ids, mask, base_hidden, base_weight, base_bias = (
            None if tensor is None else tensor.to(model.device)
            for tensor in (base.completion_ids, base.completion_mask, base.student_hidden, *self.base_head[:2])
        )
        with self._autocast():
            hidden = completion_hidden(model, base.prompt_ids, ids, mask, self.pad_id)
        # KL(base || student): the base model takes the place of `student` in reverse_kl.
        of_base = Reading(base_hidden, head._replace(weight=base_weight, bias=base_bias))
        of_student = Reading(hidden, head)
        options = head_options(of_base, of_student)
        return linear_token_scores(*of_base.linear, *of_student.linear, ids, **options).divergence[mask]


def _share(passed) -> float:
    passed = list(passed)
    return sum(passed) / len(passed) if passed else 0.0
