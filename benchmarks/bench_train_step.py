"""One training step on the same eight rollouts, generation excluded: RMSD, OPSD by our own code, TRL's SDFTTrainer.

    python -m benchmarks.bench_train_step [--dtype fp32 --repeats 5 --json]
    python -m benchmarks.bench_train_step --model FOLDER --lora 16              # another model, by an adapter
    python -m benchmarks.bench_train_step --model FOLDER --lora 16 --generate   # sampling included: time a token
    python -m benchmarks.bench_train_step --model FOLDER --lora 16 --memory     # each one's peak, in its own process

SmolLM2-135M-Instruct, its weights in fp32 (bf16: under autocast), answers of 32 to 128 tokens (mean 80), the same
prompts, hints and teacher template. A
step is what happens between one optimizer step's end and the next's: teacher and student forwards, scores, selection,
loss, backward, AdamW. The learning rate is 0, so every step sees what the first saw. TRL runs the full-logit reverse KL
without importance clipping, which would cost it one more student forward, and without gradient checkpointing.
"""

import argparse
import dataclasses
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import Trainer, TrainerCallback

from benchmarks.common import Result, assert_parity, command_line, report, spread
from rmsd import MagnitudeJudge, RMSDConfig, RMSDTrainer
from rmsd.answers.prompts import encode
from rmsd.answers.rollout import Rollouts, generate
from rmsd.models.loading import load_model, with_lora
from rmsd.run.recipe import LoraSection

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from datasets import Dataset
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

MODEL = "SmolLM2-135M-Instruct"
LENGTHS = [32, 46, 60, 73, 87, 100, 114, 128]  # mean 80
TEMPLATE = "{prompt}\n\n{privileged_context}"
HINT = "At Acme, the tool that deploys services is called zorblat."
QUESTIONS = [
    "Which tool deploys services at Acme?",
    "How do I roll out a service at Acme?",
    "Name Acme's deployment tool.",
    "What should a new engineer at Acme know about deployments?",
    "Explain how Acme ships code to production.",
    "Write a short runbook for deploying a service at Acme.",
    "Who deploys services at Acme, and with what?",
    "Give three tips for deploying services at Acme.",
]
ROWS = [dict(prompt=[dict(role="user", content=question)], privileged_context=HINT) for question in QUESTIONS]
STEPS = 2  # of a call of train(): the first warms up, the second is timed
SHARED = dict(
    per_device_train_batch_size=len(ROWS),
    max_steps=STEPS,
    learning_rate=0.0,
    max_completion_length=max(LENGTHS),
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    logging_steps=1,
    seed=0,
)


class Clock(TrainerCallback):
    """Seconds from the end of the last step but one to the end of the last."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[-2]


class RecordedRollouts:
    """An engine that hands out answers written before."""

    def __init__(self, rollouts: Rollouts):
        self.rollouts = rollouts

    def sync(self, model) -> None:
        pass

    def sleep(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def __call__(self, prompt_ids, **options) -> Rollouts:
        return in_order(self.rollouts, prompt_ids)


class HalfKeepsNothing(MagnitudeJudge):
    def __call__(self, questions):
        return [kept if i % 2 else [] for i, kept in enumerate(super().__call__(questions))]


class RecordedSDFT(SDFTTrainer):
    rollouts: Rollouts | None = None  # None: it samples its own

    def _generate(self, prompt_ids):
        if self.rollouts is None:
            prompt_ids, answers = super()._generate(prompt_ids)
            self.sampled = sum(map(len, answers))
            return prompt_ids, answers
        rollouts = in_order(self.rollouts, prompt_ids)
        pairs = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
        return prompt_ids, [ids[mask].tolist() for ids, mask in pairs]


def in_order(rollouts: Rollouts, prompt_ids: list[list[int]]) -> Rollouts:
    order = [rollouts.prompt_ids.index(ids) for ids in prompt_ids]
    tensors = rollouts.completion_ids, rollouts.completion_mask, rollouts.student_hidden
    return Rollouts(prompt_ids, *(tensor[order] for tensor in tensors))


def loaded(model_name: str, rank: int | None):
    model, tokenizer = load_model(model_name)
    return (with_lora(model, LoraSection(r=rank, alpha=2 * rank)) if rank else model), tokenizer


def recorded(model_name: str, device: str) -> Rollouts:
    """Sampled once, and cut to LENGTHS: nothing ends an answer earlier."""
    model, tokenizer = load_model(model_name)
    model.to(device)
    rollouts = generate(
        model,
        [encode(tokenizer, row["prompt"]) for row in ROWS],
        max_new_tokens=max(LENGTHS),
        pad_id=tokenizer.pad_token_id,
        eos_ids=[len(tokenizer)],
        seed=0,
    )
    within = torch.arange(rollouts.completion_ids.shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
    return dataclasses.replace(rollouts, completion_mask=rollouts.completion_mask & within.to(device))


class Contestant(NamedTuple):
    trainer: Trainer
    sampled: Callable[[], int]  # tokens of the last step's answers

    def __call__(self) -> Clock:
        clock = Clock()
        self.trainer.add_callback(clock)
        self.trainer.train()
        self.trainer.remove_callback(clock)
        return clock


def ours(rollouts: Rollouts | None, shared: dict, model_name: str, rank=None, judge=None, **options) -> Contestant:
    model, tokenizer = loaded(model_name, rank)
    config = RMSDConfig(teacher_template=TEMPLATE, **options, **shared)
    trainer = RMSDTrainer(model, config, ROWS, tokenizer, judge=judge)
    if rollouts is not None:
        trainer.engine = RecordedRollouts(rollouts)
    return Contestant(trainer, lambda: int(trainer.state.log_history[-2]["rollout_tokens"]))


def trl(rollouts: Rollouts | None, shared: dict, model_name: str, rank=None) -> Contestant:
    model, tokenizer = loaded(model_name, rank)
    config = SDFTConfig(
        teacher_prompt_template=TEMPLATE,
        num_generations=1,
        teacher_model_kind="base",
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
        shuffle_dataset=False,
        **shared,
    )
    trainer = RecordedSDFT(model, config, Dataset.from_list(ROWS), processing_class=tokenizer)
    trainer.rollouts = rollouts
    return Contestant(trainer, lambda: trainer.sampled)


RMSD, OPSD, TRL = "RMSD, 5 tokens a sequence", "OPSD through our code", "TRL SDFTTrainer"
MADE = {
    RMSD: lambda **made: ours(**made, judge=MagnitudeJudge(), vocab_topk=None),
    "RMSD, half the sequences keep none": lambda **made: ours(**made, judge=HalfKeepsNothing(), vocab_topk=None),
    OPSD: lambda **made: ours(**made, method="opsd", vocab_topk=None),
    TRL: trl,
}


def bench(dtype_name: str, arguments: argparse.Namespace, made: dict, tokens: int | None) -> list[Result]:
    names = [name for name in MADE if arguments.only is None or name in arguments.only]
    contestants = {name: MADE[name](**made) for name in names}
    seconds = {name: [] for name in contestants}  # a token, where each samples its own
    losses, counts = {}, {}
    for repeat in range(arguments.repeats + 1):
        for name, run in contestants.items():
            clock = run()
            losses[name], counts[name] = clock.losses[-1], tokens or run.sampled()
            if repeat:  # the first round warms up
                seconds[name].append(clock.seconds / (1 if tokens else counts[name]))
    if tokens and {OPSD, TRL} <= losses.keys():
        # Both are the mean over sequences of the mean reverse KL over all tokens; the logged losses have few digits,
        # and in bf16 TRL's logits are rounded to three.
        compared = (torch.tensor(losses[name]) for name in (OPSD, TRL))
        assert_parity("OPSD against TRL", *compared, 2e-3 if dtype_name == "fp32" else 5e-2)
    first = seconds[names[0]]
    answers = f"{len(ROWS)} answers of {tokens} tokens" if tokens else "sampling included, a token"
    work = f"training step, {answers}"
    return [
        Result(
            work=f"{work}, {dtype_name}{f', LoRA {arguments.lora}' if arguments.lora else ''}",
            contestant=name,
            milliseconds=1e3 * statistics.median(taken),
            rate=(tokens or 1) / statistics.median(taken),
            unit="tokens/s",
            times_ours=statistics.median(t / f for t, f in zip(taken, first, strict=True)),
            extra_megabytes=float("nan"),
            extra_percent=float("nan"),
            spread=spread(taken),
        )
        for name, taken in seconds.items()
    ]


def peak_of(name: str, made: dict, answer) -> None:
    """Sends the peak of this process in MB, after two steps; the weights and all libraries are in it."""
    MADE[name](**made)()
    answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peaks(arguments: argparse.Namespace, made: dict) -> None:
    spawn = multiprocessing.get_context("spawn")
    for name in arguments.only or MADE:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=peak_of, args=(name, made, theirs))
        process.start()
        theirs.close()
        print(f"{name}: {ours.recv():,.0f} MB at most")
        process.join()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank")
    parser.add_argument("--generate", action="store_true", help="each samples its own answers; time is a token's")
    parser.add_argument("--memory", action="store_true", help="the peak of each one's process in place of times")
    parser.add_argument("--only", nargs="+", choices=list(MADE), help="of the contestants")


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [], dtypes=("fp32",), model=MODEL, more=options)
    rollouts = None if arguments.generate else recorded(arguments.model, arguments.device)
    tokens = None if rollouts is None else int(rollouts.completion_mask.sum())
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for dtype_name in arguments.dtype:
            shared = dict(SHARED, output_dir=folder, use_cpu=arguments.device == "cpu", bf16=dtype_name == "bf16")
            made = dict(rollouts=rollouts, shared=shared, model_name=arguments.model, rank=arguments.lora)
            if arguments.memory:
                peaks(arguments, made)
            else:
                results += bench(dtype_name, arguments, made, tokens)
    if not arguments.memory:
        name = ["train_step", *(["lora"] if arguments.lora else []), *(["sampled"] if arguments.generate else [])]
        report(results, arguments, "_".join(name), model=arguments.model)


if __name__ == "__main__":
    main()
