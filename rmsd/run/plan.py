"""What a run would take, said before it is started: `dry_run=true`.

The model is made without weights (rmsd.run.skeleton) and counted (rmsd.run.costs). Lengths come from the data and the
tokenizer; where that cannot be read, the texts' lengths in characters stand in, and the plan says so.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from ..answers.completions import completion_ids
from ..answers.data import check_lengths, context_of
from ..answers.environments import Environments
from ..answers.episodes import Episodes
from ..answers.prompts import Prompts, encode, prompt_text, teacher_prompt, tools_of
from ..judge import Candidate, Judge, LLMJudge, Question
from ..judge.llm import llm_of
from ..models.sharding import check_sharded_teacher
from ..step.judging import told_text
from ..tasks import Task
from ..training.checks import embedding_size
from ..training.config import RMSDConfig
from .costs import Lengths, Sizes, flops, judged_at_most, memory
from .recipe import Recipe
from .skeleton import skeleton

_CHARACTERS = 4  # a token of English text, about
_TEMPLATE = 12  # tokens that a chat template puts around one message, about
# The rest depends on how long answers get.
_EXACT = ("student's weights", "optimizer's states", "teacher", "evaluator's copy of the base head", "gradients")


@dataclass(frozen=True)
class Plan:
    """A run in numbers, and as text. Only steps, rollouts and requests are exact whatever the answers will be."""

    recipe: Recipe
    args: RMSDConfig
    rows: list[dict]
    judge: Judge
    task: Task | None
    tokenizer: object | None
    source: str  # of the model's dimensions
    sizes: Sizes
    lengths: Lengths
    environments: Environments | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        args: RMSDConfig,
        rows: list[dict],
        judge: Judge,
        task: Task | None,
        environments: Environments | None = None,
    ) -> "Plan":
        """
        Raises:
            FileNotFoundError, ValueError: what would stop the run itself once its weights are loaded, in one line.
        """
        model, tokenizer, source = skeleton(recipe)
        has_adapter = hasattr(model, "peft_config")  # by a lora section, or the model's own
        if args.teacher == "adapter_off" and not has_adapter:
            raise ValueError("teacher='adapter_off' needs a lora section; 'initial' keeps a copy of any other model")
        if args.fsdp:
            check_sharded_teacher(has_adapter, args)
        tools = environments.schemas if environments else None
        if tokenizer and environments:
            Episodes(tokenizer, environments)  # which refuses a chat template that is not one of tools
        if tokenizer:
            config = model.config.get_text_config()
            prompts = Prompts(
                tokenizer, args.teacher_template, args.teacher_place, tools, getattr(judge, "contrasts", None)
            )
            longest = args.max_completion_length
            check_lengths(rows, prompts, longest, context_of(config, args), embedding_size(model))
        lengths = lengths_of(rows, tokenizer, args, tools)
        sizes = Sizes.of(model, recipe.quantization and recipe.quantization.bytes_a_weight)
        return cls(recipe, args, rows, judge, task, tokenizer, source, sizes, lengths, environments)

    # ---- numbers ---------------------------------------------------------------------------------------------------

    @property
    def generated(self) -> bool:
        """Whether the student writes answers; else the rows bring them."""
        return self.rows[0].get("completion") is None

    @property
    def on_gpu(self) -> bool:
        """Whether the run is for one. 16 bits without use_cpu are for one that need not be here."""
        low = self.args.bf16 or self.args.fp16 or self.recipe.dtype != "float32"
        return (low and not self.recipe.train.get("use_cpu")) or self.args.device.type != "cpu"

    @property
    def step_size(self) -> int:
        """Rollouts a step, of all processes together."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, as Trainer counts them."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        batches = len(self.rows) / (args.per_device_train_batch_size * args.world_size)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))

    @property
    def rollouts(self) -> int:
        """In all steps, at most: an epoch's last step may be smaller."""
        return self.steps * self.step_size

    @cached_property
    def told(self) -> int:
        """Rows whose teacher is told something; the others are anchors."""
        return sum(bool(told_text(row).strip()) for row in self.rows)

    @property
    def contrasted(self) -> float:
        """Share of the rows whose answers the teacher reads under a contrast context too."""
        asks = self.args.method == "rmsd" and getattr(self.judge, "contrasts", None)
        return self.told / len(self.rows) if asks else 0.0

    @property
    def llm(self) -> LLMJudge | None:
        return llm_of(self.judge)

    @property
    def asks(self) -> bool:
        """Whether a judge is asked that takes requests."""
        return self.args.method == "rmsd" and self.llm is not None

    def requests(self, rollouts: int) -> int:
        """To the judge, for that many rollouts, at most: retries apart, and as if none shared a request."""
        if not self.asks:
            return 0
        return judged_at_most(rollouts, len(self.rows), self.told) * self.llm.requests(self.args.num_candidates)

    # ---- text ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        heading = "plan (a dry run: no weights loaded, no judge asked, nothing written); ~ marks an estimate"
        about = _aligned([*self._data(), *self._schedule()])
        return "\n\n".join([heading, about, self._memory(), self._flops(), _aligned(self._judging())])

    def _data(self):
        rows, told, lengths = len(self.rows), self.told, self.lengths
        stored = "4 bits, " if self.recipe.quantization else ""
        yield "model", f"{self.recipe.model}, {stored}{self.recipe.dtype}: {self.sizes.total:,} parameters"
        yield "", self.source
        yield "trained", f"{self.sizes.trained:,}" + (" (LoRA)" if self.sizes.has_lora else "")
        yield "data", f"{rows:,} rows: {told:,} with privileged context, {rows - told:,} anchors"
        prompt = f"prompt {lengths.prompt:.0f} (longest {lengths.longest_prompt})"
        teacher = f"teacher's {lengths.teacher_prompt:.0f} (longest {lengths.longest_teacher_prompt})"
        yield "tokens", f"{prompt}, {teacher}, answer {lengths.answer:.0f}" + (" at most" if self.generated else "")
        if not self.tokenizer:
            yield "", f"~ by {_CHARACTERS} characters a token: the tokenizer cannot be read either"

    def _schedule(self):
        args, steps = self.args, self.steps
        batch = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size}"
        yield "steps", f"{steps:,} of {self.step_size} rollouts ({batch}: a device, micro-batches, processes)"
        yield "", f"{self.rollouts:,} rollouts, {self.rollouts / len(self.rows):.2f} epochs"
        if self.environments:
            limits = f"{args.max_tool_output:,} characters and {args.tool_seconds:g} s a call"
            yield "episodes", f"{args.max_turns} turns at most, {limits}; tools: {', '.join(self.environments.names)}"
        logits = "all logits" if args.vocab_topk is None else f"the top {args.vocab_topk} logits"
        kept = f"{min(args.num_kept, args.num_candidates)} kept of {args.num_candidates} candidates at most"
        yield "loss", f"{args.divergence} over {logits}; {kept if args.method == 'rmsd' else 'every token'}"
        for step in sorted(step for step in args.continuation_steps if step <= steps):
            yield "continuation", f"after step {step} the student becomes the teacher; {steps - step} steps follow"
        if args.continuation_metric:
            yield "continuation", f"where {args.continuation_metric} plateaus, {args.max_continuations} times at most"
        if self.task:
            samples, every = self.recipe.evaluate.samples, int(args.eval_steps)
            asked = len(self.task.target_prompts) + len(self.task.requests)
            answers = asked * (1 + samples) + len(self.task.unrelated_prompts)
            times = len({*range(0, steps + 1, every), steps})
            yield "evaluation", f"{times} times {answers:,} answers, beside what is counted below"

    def _memory(self) -> str:
        """A column for each number of processes that weights may be sharded over."""
        args = self.args
        processes = [args.world_size] if args.world_size > 1 or not args.fsdp else [2, 4, 8]
        shared = dict(generated=self.generated, on_gpu=self.on_gpu, contrasted=self.contrasted)
        columns = [memory(self.sizes, args, self.lengths, processes=n, **shared) for n in processes]
        lines = [("memory a device, GiB", *(f"{n} processes" if args.fsdp else "" for n in processes))]
        for phase, parts in columns[0].items():
            lines.append((f"  {phase}", *("" for _ in columns)))
            for part in (part for part in parts if any(column[phase][part] for column in columns)):
                lines.append((f"    {part}", *(_gib(column[phase][part], part in _EXACT) for column in columns)))
        totals = [[sum(parts.values()) for parts in column.values()] for column in columns]
        lines.append(("  most at once", *(_gib(held + max(passing), False) for held, *passing in totals)))
        notes = ["Beside it: the libraries' own memory, and what an allocator loses between tensors."]
        if args.fsdp and args.world_size == 1:
            notes.append("Steps and FLOPs are those of one process: start the dry run by torchrun, as the run itself.")
        elif not args.fsdp:
            notes.append(
                "Each process holds as much (DDP: the gradients twice); train.fsdp=true divides the student's."
            )
        return "\n".join([_aligned(lines, str.rjust), *(f"  {note}" for note in notes)])

    def _flops(self) -> str:
        of_one = flops(
            self.sizes,
            self.args,
            self.lengths,
            generated=self.generated,
            on_gpu=self.on_gpu,
            contrasted=self.contrasted,
        )
        parts = {name: value * self.step_size / 1e12 for name, value in of_one.items()}
        total = sum(parts.values())
        lines = [
            ("FLOPs a step, 1e12, on all devices", "", ""),
            *((f"    {name}", f"~ {value:,.2f}", f"{value / total:.1%}") for name, value in parts.items()),
            ("  together", f"~ {total:,.2f}", ""),
            (f"  in {self.steps:,} steps", f"~ {total * self.steps:,.0f}", ""),
        ]
        note = "\n  If every answer is as long as it may get, and none is left without a kept token."
        return _aligned(lines, str.rjust) + (note if self.generated else "")

    def _judging(self):
        section = self.recipe.judge
        if not self.asks:
            yield "judge", f"{section.kind}: no requests" if self.args.method == "rmsd" else "not asked by opsd"
            return
        most = self.requests(self.rollouts)
        written = 1 if self.llm.ask == "each" else self.llm.max_tokens
        read = self._tokens_judged()
        yield (
            "judge",
            f"{section.model} at {section.base_url or 'the default endpoint'}, key from {section.api_key_env}",
        )
        yield "requests", f"{self.requests(self.step_size)} a step at most, and {most:,} in the run; retries on top"
        drawn = self.rollouts * self.told / len(self.rows) * self.llm.requests(self.args.num_candidates)
        yield "", f"~ {drawn:,.0f} in the run as rows are drawn; less what is cached"
        limit, in_all = "as many written as the model likes", ""
        if written is not None:  # some models take no limit
            limit, in_all = f"{written} written at most", f", {written * most / 1e6:,.1f} million written at most"
        yield "tokens", f"~ {read:,} read a request at most, {limit}"
        yield "", f"~ {read * most / 1e6:,.1f} million read in the run{in_all}"

    def _tokens_judged(self) -> int:
        """Of the judge's own prompt, for an answer as long as it may get with as many candidates as there may be."""
        row = max(self.rows, key=lambda row: len(told_text(row)))
        answer = (" word",) * self.lengths.longest_answer
        places = range(0, len(answer), max(1, len(answer) // self.args.num_candidates))[: self.args.num_candidates]
        candidates = tuple(Candidate(at, " word", " other", " word", " other", -1.0) for at in places)
        prompt, context = prompt_text(row["prompt"]), told_text(row)
        text = self.llm.prompt(Question(prompt, context, answer, candidates, self.args.num_kept))
        return len(self.tokenizer(text)["input_ids"]) if self.tokenizer else _estimate(text)


def lengths_of(
    rows: list[dict], tokenizer, args: RMSDConfig, tools: Callable[[dict], list[dict]] | None = None
) -> Lengths:
    """By the tokenizer, or estimated from the number of characters. Answers that are yet to be written are taken to be
    as long as they may get. `tools`: the schemas that a row's prompt shows."""

    def number(prompt, row) -> int:
        shown = (tools(row) if tools else tools_of(row)) or []
        if tokenizer:
            return len(encode(tokenizer, prompt, shown, row.get("chat_template_kwargs")))
        return _estimate(prompt_text(prompt) + "".join(map(json.dumps, shown))) + _TEMPLATE

    def answer(row) -> int:
        completion = row.get("completion")
        if completion is None:
            return args.max_completion_length
        if isinstance(completion, str) and not tokenizer:
            return _estimate(completion)
        return len(completion_ids(row, tokenizer))

    columns = (
        [number(row["prompt"], row) for row in rows],
        [number(teacher_prompt(row, args.teacher_template, args.teacher_place), row) for row in rows],
        [answer(row) for row in rows],
    )
    return Lengths(*map(fmean, columns), *map(max, columns))


def _estimate(text: str) -> int:
    return math.ceil(len(text) / _CHARACTERS)


def _gib(size: float, exact: bool) -> str:
    return f"{'' if exact else '~ '}{size / 2**30:.2f}"


def _aligned(lines, justify=str.ljust) -> str:
    """Columns as wide as their widest cell; all but the first justified."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(justify, line[1:], widths[1:])]).rstrip() for line in lines
    )
