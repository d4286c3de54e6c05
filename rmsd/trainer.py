"""`RMSDTrainer`: transformers' Trainer whose batches are the student's own answers. It wires; step.py computes."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from transformers import Trainer

from . import step
from .config import RMSDConfig
from .continuation import TeacherSchedule
from .data import as_dataset, encode, prompt_text, teacher_prompt
from .judge import ContextJudge, Judge
from .loss import LinearRMSDLoss
from .modeling import OutputHead, completion_hidden
from .record import RunRecord, finite
from .rollout import Rollouts, eos_ids_of, generate
from .scoring import wishes
from .selection import ask, keep_mask, questions_of
from .teacher import Teacher


class RMSDTrainer(Trainer):
    """Teaches a causal LM what its privileged context says, on its own answers.

    Args:
        model: a causal LM of transformers, or a PEFT model.
        args: RMSDConfig.
        train_dataset: rows of `prompt` and `privileged_context` (rmsd.data); a Dataset or a list.
        processing_class: the tokenizer.
        judge: which candidates are relevant; ContextJudge by default. Not asked for method="opsd".
        evaluator: model -> metrics; called by `evaluate()`, so whenever `eval_strategy` says, and logged as eval_*.
        kwargs: as for Trainer (callbacks, optimizers, ...).
    """

    def __init__(
        self,
        model,
        args: RMSDConfig,
        train_dataset,
        processing_class,
        judge: Judge | None = None,
        evaluator: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        **kwargs,
    ):
        if isinstance(train_dataset, list):
            train_dataset = as_dataset(train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            # Trainer asks for an eval_dataset wherever it evaluates; the evaluator brings its own questions.
            eval_dataset=train_dataset if evaluator else None,
            processing_class=processing_class,
            data_collator=list,
            **kwargs,
        )
        # The loss is divided by the whole step's number of sequences, see get_batch_samples.
        self.loss_is_scaled_for_ga = True
        self.judge = judge or ContextJudge()
        self.evaluator = evaluator
        self.teacher = Teacher(self.model, args.teacher)
        self.head_transform = OutputHead.of(self.model).transform
        self.pad_id, self.eos_ids = processing_class.pad_token_id, eos_ids_of(self.model, processing_class)
        self.loss = LinearRMSDLoss(
            num_candidates=args.num_candidates, num_kept=args.num_kept, criterion=args.criterion,
            threshold=args.threshold, divergence=args.divergence, beta=args.beta, vocab_topk=args.vocab_topk,
            tail=args.tail, temperature=args.temperature, backend=args.backend,
        ).to(args.device)  # fmt: skip
        self.record = next((c for c in self.callback_handler.callbacks if isinstance(c, RunRecord)), None)
        self._step_metrics: dict[str, float] = defaultdict(float)
        self.add_callback(TeacherSchedule(self))
        self._check_lengths()

    # ---- the step, in the order the data flows ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Prompts become rollouts, scored and judged, for all of a step's micro-batches before the first backward: the
        loss is a mean over the sequences that keep a token, and their number must be known first."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        started = time.monotonic()
        parts = [self._rollouts(rows, micro_batch) for micro_batch, rows in enumerate(batches)]
        sequences = sum(len(part["sequences"]) for part in parts)
        sequences = self.accelerator.reduce(torch.tensor(float(sequences), device=device))
        self._step_metrics["prepare_seconds"] += time.monotonic() - started
        return parts, sequences.clamp_min(1.0)

    def _rollouts(self, rows: list[dict], micro_batch: int) -> dict:
        """One micro-batch: generate, score, judge."""
        args, tokenizer = self.args, self.processing_class
        model = self.accelerator.unwrap_model(self.model)
        rollouts = generate(
            model,
            [encode(tokenizer, row["prompt"]) for row in rows],
            max_new_tokens=args.max_completion_length,
            pad_id=self.pad_id,
            eos_ids=self.eos_ids,
            temperature=args.sampling_temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=self._seed(micro_batch),
        )
        teacher_ids = [encode(tokenizer, teacher_prompt(row, args.teacher_template)) for row in rows]
        teacher_hidden = self.teacher.hidden(teacher_ids, rollouts, self.pad_id)
        student = (rollouts.student_hidden, self._student_head())
        teacher = (teacher_hidden, self.teacher.head)
        scores, candidates = step.score(
            self.loss, *student, *teacher, rollouts.completion_ids, rollouts.completion_mask
        )
        asked_at = time.monotonic()
        questions = questions_of(
            [prompt_text(row["prompt"]) for row in rows],
            [row["privileged_context"] for row in rows],
            self._token_texts(rollouts),
            scores,
            candidates,
            wishes(*student, *teacher, candidates, args.temperature),
            self._decode,
            args.num_kept,
        )
        kept = ask(self.judge, questions) if args.method == "rmsd" else [list(range(len(q.tokens))) for q in questions]
        keep = keep_mask(kept, rollouts.completion_mask.shape)
        self._count(rollouts, scores, candidates, keep, time.monotonic() - asked_at)
        self._write_rollouts(questions, scores, kept)
        sequences, length = step.train_part(keep)
        return {
            "input_ids": rollouts.completion_ids,  # what Trainer counts FLOPs by
            "rollouts": rollouts,
            "teacher_hidden": teacher_hidden,
            "keep": keep,
            "sequences": sequences,
            "length": length,
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The student's forward on the sequences that keep a token, cut after the last one."""
        rollouts, sequences, length = inputs["rollouts"], inputs["sequences"], inputs["length"]
        if not length:
            # Nothing kept: zero, but with a graph, for Trainer calls backward() all the same.
            loss = sum(p.flatten()[0] * 0.0 for p in model.parameters() if p.requires_grad)
            return (loss, None) if return_outputs else loss
        device = rollouts.completion_ids.device
        on_device = sequences.to(device)
        ids, mask = rollouts.completion_ids[on_device, :length], rollouts.completion_mask[on_device, :length]
        prompt_ids = [rollouts.prompt_ids[i] for i in sequences.tolist()]
        student_hidden = completion_hidden(model, prompt_ids, ids, mask, self.pad_id)
        # Data parallel training averages gradients over ranks; ours are shares of a sum.
        scale = self.accelerator.num_processes
        loss = scale * step.train_loss(
            self.loss, student_hidden, self._student_head(),
            inputs["teacher_hidden"][on_device, :length], self.teacher.head,
            ids, mask, inputs["keep"][sequences, :length], num_items_in_batch,
        )  # fmt: skip
        return (loss, None) if return_outputs else loss

    def _student_head(self) -> OutputHead:
        module = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        return OutputHead(module.weight, getattr(module, "bias", None), **self.head_transform)

    def _seed(self, micro_batch: int) -> int:
        """A seed for every micro-batch of every step and rank, so that a resumed run samples what it would have."""
        place = (self.args.seed, self.state.global_step, micro_batch, self.accelerator.process_index)
        return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8]) >> 1

    # ---- the teacher's weights -------------------------------------------------------------------------------------

    def continue_from_student(self) -> None:
        """The student as it is becomes the teacher, under the same privileged prompts (continuation)."""
        self.teacher.snapshot()
        done = sum("continuation" in entry for entry in self.state.log_history)
        # Logging anything tells Trainer that the step has been logged: the step's own entry would be lost.
        due = self.control.should_log
        self.log({"continuation": done + 1})
        self.control.should_log = due

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:  # a checkpoint
            self.teacher.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.teacher.load(resume_from_checkpoint)

    # ---- evaluation and logs ---------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if self.evaluator is None:
            raise ValueError("evaluate() needs an evaluator: RMSDTrainer(..., evaluator=...)")
        metrics = self.evaluator(self.accelerator.unwrap_model(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self._step_metrics, "nonfinite_rows": self.loss.nonfinite_rows.item()}
            self._step_metrics.clear()
        super().log(logs, start_time)

    def _count(self, rollouts, scores, candidates, keep, seconds) -> None:
        mask = rollouts.completion_mask
        finite_divergence = scores.divergence[mask & scores.divergence.isfinite()]
        metrics = self._step_metrics
        metrics["rollout_tokens"] += mask.sum().item()
        metrics["candidates"] += (candidates >= 0).sum().item()
        metrics["kept_tokens"] += keep.sum().item()
        metrics["kept_sequences"] += keep.any(1).sum().item()
        metrics["divergence"] = finite_divergence.mean().item() if finite_divergence.numel() else 0.0
        metrics["judge_seconds"] += seconds

    def _write_rollouts(self, questions, scores, kept) -> None:
        if self.record is None or not self.is_world_process_zero():
            return
        self.record.rollouts(
            [
                {
                    "step": self.state.global_step + 1,
                    "prompt": question.prompt,
                    "privileged_context": question.privileged_context,
                    "tokens": list(question.tokens),
                    **{
                        name: finite(getattr(scores, name)[b, : len(question.tokens)].tolist())
                        for name in ("student_logprob", "teacher_logprob", "divergence")
                    },
                    "candidates": [candidate.position for candidate in question.candidates],
                    "kept": kept[b],
                    "preferred": {candidate.position: candidate.promoted for candidate in question.candidates},
                }
                for b, question in enumerate(questions[: self.args.recorded_rollouts])
            ]
        )

    def _decode(self, ids: list[int]) -> list[str]:
        return self.processing_class.batch_decode([[i] for i in ids])

    def _token_texts(self, rollouts: Rollouts) -> list[list[str]]:
        pairs = zip(rollouts.completion_ids.cpu(), rollouts.completion_mask.cpu(), strict=True)
        return [self._decode(ids[mask].tolist()) for ids, mask in pairs]

    def _check_lengths(self) -> None:
        """A prompt that leaves no room for the answer is refused before anything is trained."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return
        for number, row in enumerate(self.train_dataset):
            for role, prompt in (("prompt", row["prompt"]), ("teacher's prompt", self._teacher_prompt(row))):
                length = len(encode(self.processing_class, prompt)) + self.args.max_completion_length
                if length > limit:
                    raise ValueError(
                        f"row {number}: the {role} and an answer of max_completion_length="
                        f"{self.args.max_completion_length} take {length} tokens; the model's context holds {limit}"
                    )

    def _teacher_prompt(self, row):
        return teacher_prompt(row, self.args.teacher_template)
