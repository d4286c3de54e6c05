"""`RMSDTrainer`: transformers' Trainer whose batches are the student's own answers. It wires; rmsd.step computes."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import denumpify_detensorize

from ..answers.data import check_lengths, checked_dataset, context_of, rows_of
from ..answers.engines import engine_for
from ..answers.environments import ContextAfter, Environments, Factory
from ..answers.episodes import Episodes
from ..answers.prompts import Prompts, prompt_text
from ..answers.rollout import eos_ids_of, pad_id_of
from ..answers.sampling import seed_at
from ..answers.teacher import Teacher
from ..judge import ContextJudge, Judge
from ..judge.llm import llm_of
from ..loss import LinearRMSDLoss
from ..models.heads import OutputHead, Reading, mixed_precision_dtype
from ..models.hidden import completion_hidden
from ..models.parts import trained_as_before
from ..models.router import RouterLoss
from ..models.sharding import as_rank_zero, check_sharded_teacher, check_sharding, whole
from ..models.transfer import to_device
from ..step.judging import judge_as_scored
from ..step.micro_batch import MicroBatch
from ..step.scoring import kept_engine_gaps, scored_by_engine, scored_by_forwards
from ..step.training import gap_weights, part_of, same_number_of_parts, settle, train_loss, uncertain, unkept_of
from ..step.writing import write
from .checkpoint import own_settings
from .checks import ReadAgain, check_arguments, embedding_size, read_model
from .config import RMSDConfig
from .continuation import TeacherSchedule
from .faults import NonfiniteGradients, saving
from .health import CollapseWatch
from .metrics import StepMetrics
from .record import RunRecord, rollout_lines
from .self_check import SelfCheck


class RMSDTrainer(Trainer):
    """Teaches a causal LM what its privileged context says, on its own answers.

    Args:
        model: a causal LM of transformers, or a PEFT model.
        args: RMSDConfig.
        train_dataset: rows of `prompt` and `privileged_context` (answers.data): a list, a datasets.Dataset or a Dataset
            of torch. Where they bring a `completion`, nothing is generated: those are the rollouts.
        processing_class: the tokenizer.
        tools: functions that the answers may call, by type hints and docstrings as transformers' get_json_schema reads
            them. An answer is an episode then: the student writes, its calls are made, it reads what they came to.
        environment_factory: makes an environment for each rollout, as for TRL's GRPOTrainer (answers.environments):
            an object with `reset(**row)` whose public methods are tools; or several by name, which rows choose from.
        context_after: (row, transcript) -> the privileged context that the teacher reads, made once the rollout is
            there. Without it that is the row's own and, where the environment has a `feedback()`, what that says.
        judge: which candidates are relevant; by default a ContextJudge that knows the data's prompts. Not asked for
            method="opsd".
        evaluator: model -> metrics; called by `evaluate()`, so whenever `eval_strategy` says, and logged as eval_*. It
            is given the model in eval mode, without gradients.
        kwargs: as for Trainer (callbacks, optimizers, ...), but for what a batch of its own or an evaluation would be
            made by.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: RMSDConfig,
        train_dataset: list[dict] | Dataset,
        processing_class: PreTrainedTokenizerBase,
        judge: Judge | None = None,
        evaluator: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        *,
        tools: Sequence[Callable] = (),
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        context_after: ContextAfter | None = None,
        **kwargs: Any,
    ):
        check_arguments(model, args, processing_class, evaluator, kwargs)
        train_dataset = checked_dataset(train_dataset)
        args = args.with_learning_rate(has_adapter=hasattr(model, "peft_config"))
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
        self.judge = judge or ContextJudge(prompt_text(row["prompt"]) for row in rows_of(train_dataset))
        # What the teacher is told instead, for a judge that asks what it would wish then.
        self.contrasts = getattr(self.judge, "contrasts", None) if args.method == "rmsd" else None
        self.evaluator = evaluator
        # Trainer leaves a model that will be sharded, among others, where it is; what is copied from it here, and what
        # is asked of it before the first step, belongs on the device too.
        if self.model.device.type != args.device.type:
            self._move_model_to_device(self.model, args.device)
        self.router_loss = RouterLoss(self.model, args.router_loss)
        self.head_dtype = mixed_precision_dtype(args.device, bf16=args.bf16, fp16=args.fp16)
        with whole(self.model):  # which ZeRO-3 may have loaded in parts
            self.teacher = Teacher(self.model, args.teacher, self.accelerator.autocast, self.head_dtype)
            if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
                check_sharded_teacher(self.teacher.has_adapter, args, self.teacher.has_snapshot)
            if args.continuation_steps or args.continuation_metric:
                self.teacher.check_continuation()
            read_model(self)
        self.loss = LinearRMSDLoss(**args.loss_options).to(args.device)
        if args.forward_kl_above is not None:
            self.forward_kl = LinearRMSDLoss(**{**args.loss_options, "divergence": "forward_kl"}).to(args.device)
            self.forward_kl.nonfinite_rows = self.loss.nonfinite_rows  # one count, for the log; in both, twice
        batch = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and len(train_dataset) < batch:
            raise ValueError(f"dataloader_drop_last leaves nothing of {len(train_dataset)} rows in batches of {batch}")
        self.record = next((c for c in self.callback_handler.callbacks if isinstance(c, RunRecord)), None)
        self.metrics = StepMetrics()
        self.watch = CollapseWatch(self.teacher, self.log)
        self.add_callback(self.watch)
        self.per_turn = args.selection_unit == "turn"
        self.add_callback(TeacherSchedule(self.teacher, self.continue_from_student))
        self.add_callback(NonfiniteGradients(self.metrics, self.loss, self.accelerator))
        self.add_callback(ReadAgain(self))
        self.add_callback(SelfCheck(self))
        config = self.model.config.get_text_config()
        context = context_of(config, args)
        self.episodes = None
        if args.guided_rollouts and context_after is not None:
            raise ValueError("guided_rollouts needs a privileged context that is there before the rollout")
        if tools or environment_factory:
            environments = Environments(tools, environment_factory, args.tool_limits, context_after)
            self.episodes = Episodes(processing_class, environments, max_turns=args.max_turns)
        shown = self.episodes.environments.schemas if self.episodes else None
        self.prompts = Prompts(processing_class, args.teacher_template, args.teacher_place, shown, self.contrasts)
        longest, size = args.max_completion_length, embedding_size(self.model)
        read, told = check_lengths(rows_of(train_dataset), self.prompts, longest, context, size)
        if self.episodes:  # what an environment says at its start, and its feedback, is known only then
            read, told = (min(context, length + 2 * args.max_tool_output) for length in (read, told))
        length = max(read, told) + 1 if args.engine_scores else read
        made_for = length - args.engine_scores  # an engine that is not the model itself
        own = context if args.engine == "transformers" else made_for
        self.context = own, made_for if args.engine_scores else context
        with whole(self.model):
            self.engine = engine_for(args, self.model, max_length=length, autocast=self.accelerator.autocast)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = check_sharding(self.accelerator, self.args)

    def train(self, *args, **kwargs):
        """As Trainer's. Raises Collapsed where a sign of collapse has ended the run."""
        output = super().train(*args, **kwargs)
        while self.watch.found:
            checkpoint = self.watch.checkpoint_to_go_on_from(self.args, self.state)
            self.args.eval_on_start = False  # an entry of a step that none is due at would count towards a plateau
            output = super().train(resume_from_checkpoint=str(checkpoint))
        self.engine.finish()
        return output

    # ---- the step, in the order the data flows ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Prompts become rollouts, scored and judged, for all of a step's micro-batches before the first backward: the
        loss is a mean over the sequences that keep a token, and their number must be known first."""
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None  # resumed from its last step: Trainer counts steps when they are made, and makes one more
        rows, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not rows:
            return [], None
        started = time.monotonic()
        batches = [MicroBatch.of(some, self.prompts) for some in rows]
        with whole(self.student):
            self.engine.sync(self.student)
            self._judge(self._scored(batches))
            self.engine.sleep()
            # Its engine steps the optimizer after a micro-batch's first backward.
            one_forward = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            for batch in batches:
                settle(batch, self.teacher, self.pad_id, one_forward, self.args.unkept_kl)
        self._note(batches)
        same_number_of_parts(batches, self.accelerator)
        sequences = sum(batch.keep.any(1).sum() for batch in batches)
        sequences = self.accelerator.reduce(to_device(sequences.float(), device))
        self.metrics.add_seconds("prepare_seconds", time.monotonic() - started)
        return [batch.inputs() for batch in batches], sequences.clamp_min(1.0)

    def _written(self, batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """One micro-batch after the other, each when it is asked for."""
        args = self.args
        for number, batch in enumerate(batches):
            yield write(
                batch,
                self.engine,
                self.prompts,
                self.pad_id,
                args.device,
                self.episodes,
                teacher=self.teacher,
                guided_rollouts=args.guided_rollouts,
                context=self.context,
                max_new_tokens=args.max_completion_length,
                eos_ids=self.eos_ids,
                temperature=args.sampling_temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                seed=self._seeds(number, len(batch.rows)),
            )

    def _scored(self, batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        written = self._written(batches)
        if self.args.engine_scores:
            return scored_by_engine(written, self.engine, self.teacher, self.loss, self.per_turn)
        return scored_by_forwards(
            written,
            self.student,
            self.student_head(),
            self.teacher,
            self.loss,
            self.pad_id,
            temperature=self.args.temperature,
            vocab_topk=self.args.vocab_topk,
            per_turn=self.per_turn,
        )

    def _judge(self, scored: Iterator[MicroBatch]) -> None:
        args = self.args
        judge = self.judge if args.method == "rmsd" else None
        judge_as_scored(scored, judge, self.processing_class, args.num_kept, args.min_gap, self.per_turn)

    def _note(self, batches: list[MicroBatch]) -> None:
        """Counts the step's micro-batches for the log, and records the step's first rollouts."""
        self.metrics.steps += 1
        shown = self.args.recorded_rollouts
        if llm := llm_of(self.judge):
            self.metrics.add_asked(llm)
        for batch in batches:
            self.metrics.count(batch, self.eos_ids)
            if self.record and self.is_world_process_zero():
                self.record.rollouts(rollout_lines(self.state.global_step + 1, batch, shown))
            shown = max(0, shown - len(batch.rows))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A forward and backward for each part of the batch, so that one part's activations are held at a time."""
        batch = inputs["micro_batch"]
        *others, last = map(batch.inputs, batch.parts)
        train = super().training_step
        with self.accelerator.no_sync(model) if others else contextlib.nullcontext():
            loss = sum(train(model, part, num_items_in_batch) for part in others)
        loss = loss + train(model, last, num_items_in_batch)
        # Returned for the log alone, whose sum would stay NaN. NonfiniteGradients looks at what a step is made of.
        return loss.where(loss.isfinite(), 0.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The student's forward over one part of the batch."""
        batch, part = inputs["micro_batch"], inputs["part"]
        rollouts, teacher_hidden = part_of(batch, part)
        ids, mask, attended = rollouts.completion_ids, rollouts.completion_mask, rollouts.attention_mask
        with self.router_loss.of_forwards(model) as of_router:
            hidden = completion_hidden(model, rollouts.prompt_ids, ids, attended, self.pad_id, one_forward=True)
        # FSDP leaves the head's weight whole after the forward, until the backward.
        student, teacher = Reading(hidden, self.student_head()), Reading(teacher_hidden, self.teacher.head)
        if self.args.engine_scores:
            gaps = kept_engine_gaps(batch, part, student, teacher, self.loss)
            self.metrics.add_gaps(gaps, int(part.keep.sum()))
        # Data parallel training averages gradients over ranks; ours are shares of a sum.
        scale = self.accelerator.num_processes
        weights = gap_weights(batch, part, self.args.gap_weight)
        loss = scale * train_loss(self.loss, student, teacher, ids, mask, part.keep, num_items_in_batch, weights)
        if self.args.forward_kl_above is not None:
            covered = uncertain(batch, part, self.args.forward_kl_above) * (1.0 if weights is None else weights)
            made = student, teacher, ids, mask, part.keep, num_items_in_batch, covered
            loss = loss + scale * train_loss(self.forward_kl, *made)
        if batch.untold_hidden is not None:
            sequences = to_device(part.sequences, ids.device)
            untold = Reading(batch.untold_hidden[sequences, : part.keep.shape[1]], self.teacher.head)
            unkept = unkept_of(part.keep, rollouts.on_host.completion_mask)
            held = scale * train_loss(self.loss, student, untold, ids, mask, unkept, num_items_in_batch)
            self.metrics.add_unkept_kl(held.detach())
            loss = loss + self.args.unkept_kl * held
        if of_router:  # the mean over the sequences that are trained on, as the loss is
            loss = loss + scale * sum(of_router) * part.keep.any(1).sum().item() / num_items_in_batch
        return (loss, None) if return_outputs else loss

    @property
    def student(self) -> torch.nn.Module:
        """The model without what accelerate has put around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def eos_ids(self) -> list[int]:
        """As they are now: transformers may change the model's generation config until the first step."""
        return eos_ids_of(self.student, self.processing_class)

    @property
    def pad_id(self) -> int:
        """As it is now, as `eos_ids`."""
        return pad_id_of(self.processing_class, self.eos_ids)

    def student_head(self) -> OutputHead:
        return OutputHead.current(self.student, self.head_transform).in_dtype(self.head_dtype)

    def _seeds(self, micro_batch: int, count: int) -> list[int]:
        """One for every row of every step: a resumed run samples what it would have, and several processes what one
        with the whole batch does, of which this micro-batch is the (micro_batch * ranks + rank)-th part."""
        part = micro_batch * self.accelerator.num_processes + self.accelerator.process_index
        first = part * self.args.train_batch_size
        return [seed_at(self.args.seed, self.state.global_step, first + i) for i in range(count)]

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
        with self.router_loss.as_asked_for():
            super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:  # a checkpoint
            self.teacher.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with trained_as_before(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.teacher.load_student(resume_from_checkpoint)
            self.teacher.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        own = own_settings(self.optimizer, self.lr_scheduler, checkpoint) if checkpoint else contextlib.nullcontext()
        with own:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and self.is_deepspeed_enabled:  # whose engine loads weights in _load_from_checkpoint's place
            self.teacher.load(checkpoint)

    # ---- evaluation and logs ---------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if self.evaluator is None:
            raise ValueError("evaluate() needs an evaluator: RMSDTrainer(..., evaluator=...)")
        was_training = self.student.training
        self.student.eval()
        with whole(self.student), torch.no_grad():
            metrics = denumpify_detensorize(dict(self.evaluator(self.student)))  # numbers that JSON can hold
        self.student.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in as_rank_zero(metrics).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self.metrics.drain(self.accelerator, self.loss.nonfinite_rows)}
        super().log(logs, start_time)
