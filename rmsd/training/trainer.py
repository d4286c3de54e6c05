"""`RMSDTrainer`: transformers' Trainer whose batches are the student's own answers. It wires; step.py computes."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from ..answers.completions import rollouts_of
from ..answers.data import check_lengths, check_row, checked_rows, context_of, encode, prompt_text, teacher_prompt
from ..answers.engines import TOP, engine_for
from ..answers.rollout import Rollouts, eos_ids_of, pad_id_of
from ..answers.teacher import Teacher
from ..judge import ContextJudge, Judge
from ..judge.base import Question
from ..judge.pieces import Pieces
from ..loss import LinearRMSDLoss
from ..models.heads import OutputHead
from ..models.hidden import completion_hidden
from ..models.sharding import as_rank_zero, check_sharded_teacher, check_sharding, most_of_ranks, whole
from ..step import training as step
from ..step.judging import ask, keep_mask, questions_of, told_text
from ..step.routes import Scored, Written, engine_gaps, scored_by_engine, scored_by_trainer
from ..step.wishes import Logprobs
from .config import RMSDConfig
from .continuation import TeacherSchedule
from .faults import NonfiniteGradients, saving
from .metrics import StepMetrics
from .record import RunRecord, rollout_lines


class RMSDTrainer(Trainer):
    """Teaches a causal LM what its privileged context says, on its own answers.

    Args:
        model: a causal LM of transformers, or a PEFT model.
        args: RMSDConfig.
        train_dataset: rows of `prompt` and `privileged_context` (answers.data): a list, a datasets.Dataset or a Dataset
            of torch. Where they bring a `completion`, nothing is generated: those are the rollouts.
        processing_class: the tokenizer.
        judge: which candidates are relevant; by default a ContextJudge that knows the data's prompts. Not asked for
            method="opsd".
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
            train_dataset = checked_rows(train_dataset)
        else:
            for number, row in enumerate(train_dataset):
                check_row(row, f"row {number}")
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
        self.judge = judge or ContextJudge(prompt_text(row["prompt"]) for row in train_dataset)
        self.evaluator = evaluator
        # Trainer leaves a model that will be sharded, among others, where it is; what is copied from it here, and what
        # is asked of it before the first step, belongs on the device too.
        if self.model.device.type != args.device.type:
            self._move_model_to_device(self.model, args.device)
        self.teacher = Teacher(self.model, args.teacher, self.accelerator.autocast)
        if self.is_fsdp_enabled:
            check_sharded_teacher(self.teacher.has_adapter, args, self.teacher.has_snapshot)
        self.head_transform = OutputHead.of(self.model).transform
        self.eos_ids = eos_ids_of(self.model, processing_class)
        self.pad_id = pad_id_of(processing_class, self.eos_ids)
        self.loss = LinearRMSDLoss(
            num_candidates=args.num_candidates, num_kept=args.num_kept, criterion=args.criterion,
            threshold=args.threshold, divergence=args.divergence, beta=args.beta, vocab_topk=args.vocab_topk,
            tail=args.tail, temperature=args.temperature, backend=args.backend,
        ).to(args.device)  # fmt: skip
        batch = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and len(train_dataset) < batch:
            raise ValueError(f"dataloader_drop_last leaves nothing of {len(train_dataset)} rows in batches of {batch}")
        self.record = next((c for c in self.callback_handler.callbacks if isinstance(c, RunRecord)), None)
        self.metrics = StepMetrics()
        self.add_callback(TeacherSchedule(self))
        self.add_callback(NonfiniteGradients(self))
        config = self.model.config.get_text_config()
        read, told = check_lengths(
            train_dataset, processing_class, args.teacher_template, args.max_completion_length,
            context_of(config, args), config.vocab_size,
        )  # fmt: skip
        self.engine = engine_for(
            args.engine, self.model, max_length=max(read, told) + 1 if args.engine_scores else read,
            cache_gb=args.engine_cache_gb, num_top=TOP if args.engine_scores else 0, autocast=self.accelerator.autocast,
        )  # fmt: skip
        self.scored = scored_by_engine if args.engine_scores else scored_by_trainer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = check_sharding(self.accelerator, self.args)

    # ---- the step, in the order the data flows ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Prompts become rollouts, scored and judged, for all of a step's micro-batches before the first backward: the
        loss is a mean over the sequences that keep a token, and their number must be known first."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        started = time.monotonic()
        with whole(self.student), ThreadPoolExecutor(1) as judging:
            self.engine.sync(self.student)
            # The judge reads one micro-batch while the next is written and scored.
            asked, recorded = [], self.args.recorded_rollouts
            for scored in self.scored(self, self._written(batches)):
                asked.append(self._asked(scored, judging, recorded))
                recorded = max(0, recorded - len(scored.rows))
                for answer, _ in asked:
                    if answer.done():
                        answer.result()  # a judge that has failed ends the step before more is written
            prepared = [judged() for _, judged in asked]
        most = most_of_ranks([len(batch["parts"]) for batch in prepared], self.accelerator)
        for batch, count in zip(prepared, most, strict=True):
            batch["parts"] += [step.NO_PART] * (count - len(batch["parts"]))
        sequences = sum(batch["keep"].any(1).sum() for batch in prepared)
        sequences = self.accelerator.reduce(sequences.to(device, torch.float32))
        self.metrics.add_seconds("prepare_seconds", time.monotonic() - started)
        return prepared, sequences.clamp_min(1.0)

    def _written(self, batches: list[list[dict]]) -> Iterator[Written]:
        """The answers of one micro-batch after the other, each when it is asked for."""
        tokenizer, template = self.processing_class, self.args.teacher_template
        for micro_batch, rows in enumerate(batches):
            teacher_ids = [encode(tokenizer, teacher_prompt(row, template)) for row in rows]
            prompt_ids = [encode(tokenizer, row["prompt"]) for row in rows]
            yield Written(rows, teacher_ids, self._answers(rows, prompt_ids, micro_batch))

    def _asked(self, scored: Scored, judging: Executor, recorded: int = 0) -> tuple[Future, Callable[[], dict]]:
        """One micro-batch: the judge is asked. The second waits for its answer, and records so many rollouts."""
        args, rows, rollouts, scores = self.args, scored.rows, scored.rollouts, scored.scores
        answers = zip(rollouts.completion_ids.cpu(), rollouts.attention_mask.cpu(), strict=True)
        questions = questions_of(
            [prompt_text(row["prompt"]) for row in rows], list(map(told_text, rows)),
            [Pieces(self.processing_class, ids[mask].tolist()) for ids, mask in answers],
            scores, scored.candidates, scored.wishes, args.num_kept,
        )  # fmt: skip
        written = rollouts.completion_mask.cpu()
        answer = judging.submit(self._kept, questions, written)

        def judged() -> dict:
            kept, seconds = answer.result()
            keep = keep_mask(kept, written.shape)
            self.metrics.add_seconds("judge_seconds", seconds)
            self.metrics.count(rollouts, scores, scored.candidates, scored.wishes.tail_mass, keep)
            if self.record and self.is_world_process_zero():
                step_number, shown = self.state.global_step + 1, questions[:recorded]
                self.record.rollouts(rollout_lines(step_number, shown, scores, rollouts.completion_mask, kept))
            return {
                "input_ids": rollouts.completion_ids,  # what Trainer counts FLOPs by
                "rollouts": rollouts,
                "logprobs": [scores.student_logprob, scores.teacher_logprob],
                "teacher_hidden": scored.teacher_hidden(keep),
                "keep": keep,
                "parts": step.train_parts(
                    keep,
                    list(map(len, rollouts.prompt_ids)),
                    args.device,
                    # Its engine steps the optimizer after a micro-batch's first backward.
                    one_forward=self.accelerator.distributed_type == DistributedType.DEEPSPEED,
                ),
            }

        return answer, judged

    def _kept(self, questions: list[Question], written: torch.Tensor) -> tuple[list[list[int]], float]:
        """Kept positions of each rollout, and the seconds that it took to be told."""
        asked_at = time.monotonic()
        if self.args.method == "rmsd":
            kept = ask(self.judge, questions)
        else:
            kept = [row.nonzero().flatten().tolist() for row in written]
        return kept, time.monotonic() - asked_at

    def _answers(self, rows: list[dict], prompt_ids: list[list[int]], micro_batch: int) -> Rollouts:
        """The student's: written by the engine, or the rows' own completions."""
        args = self.args
        if rows[0].get("completion") is not None:
            return rollouts_of(rows, prompt_ids, self.processing_class, self.pad_id, args.device)
        return self.engine(
            prompt_ids,
            max_new_tokens=args.max_completion_length,
            pad_id=self.pad_id,
            eos_ids=self.eos_ids,
            temperature=args.sampling_temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=self._seed(micro_batch),
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A forward and backward for each part of the batch, so that one part's activations are held at a time."""
        *others, last = ({**inputs, "part": part} for part in inputs["parts"])
        train = super().training_step
        with self.accelerator.no_sync(model) if others else contextlib.nullcontext():
            loss = sum(train(model, part, num_items_in_batch) for part in others)
        return loss + train(model, last, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The student's forward over one part of the batch."""
        rollouts, part = inputs["rollouts"], inputs["part"]
        device = rollouts.completion_ids.device
        sequences, length = part.sequences.to(device), part.keep.shape[1]
        ids, mask, attended, teacher_hidden = (
            tensor[sequences, :length]
            for tensor in (
                rollouts.completion_ids, rollouts.completion_mask, rollouts.attention_mask, inputs["teacher_hidden"],
            )
        )  # fmt: skip
        prompt_ids = [rollouts.prompt_ids[i] for i in part.sequences.tolist()]
        student_hidden = completion_hidden(model, prompt_ids, ids, attended, self.pad_id, one_forward=True)
        models = (student_hidden, self.student_head(), teacher_hidden, self.teacher.head)
        if self.args.engine_scores and part.keep.any():
            kept = Logprobs(*(step.at_kept(logprob[sequences, :length], part.keep) for logprob in inputs["logprobs"]))
            self.metrics.own |= engine_gaps(kept, step.kept_scores(self.loss, *models, ids, part.keep))
        # Data parallel training averages gradients over ranks; ours are shares of a sum.
        scale = self.accelerator.num_processes
        loss = scale * step.train_loss(self.loss, *models, ids, mask, part.keep, num_items_in_batch)
        return (loss, None) if return_outputs else loss

    @property
    def student(self) -> torch.nn.Module:
        """The model without what accelerate has put around it."""
        return self.accelerator.unwrap_model(self.model)

    def student_head(self) -> OutputHead:
        return OutputHead.current(self.student, self.head_transform)

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

    def _save_checkpoint(self, model, trial):
        with saving(self.args.output_dir, self.state.global_step):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        if self.is_fsdp_enabled and not _internal_call:  # checkpoints may stay in shards, what is loaded elsewhere not
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
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
        with whole(self.student):
            metrics = self.evaluator(self.student)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in as_rank_zero(metrics).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self.metrics.drain(self.accelerator, self.loss.nonfinite_rows)}
        super().log(logs, start_time)
