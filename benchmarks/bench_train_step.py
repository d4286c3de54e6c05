"""One training step on the same eight rollouts, generation excluded: RMSD, OPSD by our own code, TRL's SDFTTrainer.

    python -m benchmarks.bench_train_step [--dtype fp32 --repeats 5 --json]

SmolLM2-135M-Instruct, its weights in fp32 (bf16: under autocast), answers of 32 to 128 tokens (mean 80), the same
prompts, hints and teacher template. A
step is what happens between one optimizer step's end and the next's: teacher and student forwards, scores, selection,
loss, backward, AdamW. The learning rate is 0, so every step sees what the first saw. TRL runs the full-logit reverse KL
without importance clipping, which would cost it one more student forward, and without gradient checkpointing.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback

from benchmarks.common import Result, assert_parity, command_line, report, spread
from rmsd import MagnitudeJudge, RMSDConfig, RMSDTrainer
from rmsd.answers.prompts import encode
from rmsd.answers.rollout import Rollouts, generate
from rmsd.models.loading import load_model

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

    def __call__(self, prompt_ids, **options) -> Rollouts:
        return in_order(self.rollouts, prompt_ids)


class HalfKeepsNothing(MagnitudeJudge):
    def __call__(self, questions):
        return [kept if i % 2 else [] for i, kept in enumerate(super().__call__(questions))]


class RecordedSDFT(SDFTTrainer):
    def _generate(self, prompt_ids):
        rollouts = in_order(self.rollouts, prompt_ids)
        pairs = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
        return prompt_ids, [ids[mask].tolist() for ids, mask in pairs]


def in_order(rollouts: Rollouts, prompt_ids: list[list[int]]) -> Rollouts:
    order = [rollouts.prompt_ids.index(ids) for ids in prompt_ids]
    tensors = rollouts.completion_ids, rollouts.completion_mask, rollouts.student_hidden
    return Rollouts(prompt_ids, *(tensor[order] for tensor in tensors))


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


def ours(rollouts: Rollouts, shared: dict, model_name: str, judge=None, **options) -> Callable[[], Clock]:
    model, tokenizer = load_model(model_name)
    config = RMSDConfig(teacher_template=TEMPLATE, **options, **shared)
    trainer = RMSDTrainer(model, config, ROWS, tokenizer, judge=judge)
    trainer.engine = RecordedRollouts(rollouts)
    return timed(trainer)


def trl(rollouts: Rollouts, shared: dict, model_name: str) -> Callable[[], Clock]:
    model, tokenizer = load_model(model_name)
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
    return timed(trainer)


def timed(trainer) -> Callable[[], Clock]:
    def run() -> Clock:
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        trainer.remove_callback(clock)
        return clock

    return run


def bench(dtype_name: str, arguments: argparse.Namespace, folder: str) -> list[Result]:
    rollouts = recorded(arguments.model, arguments.device)
    tokens = int(rollouts.completion_mask.sum())
    shared = dict(SHARED, output_dir=folder, use_cpu=arguments.device == "cpu", bf16=dtype_name == "bf16")
    made = dict(rollouts=rollouts, shared=shared, model_name=arguments.model)
    contestants = {
        "RMSD, 5 tokens a sequence": ours(**made, judge=MagnitudeJudge(), vocab_topk=None),
        "RMSD, half the sequences keep none": ours(**made, judge=HalfKeepsNothing(), vocab_topk=None),
        "OPSD through our code": ours(**made, method="opsd", vocab_topk=None),
        "TRL SDFTTrainer": trl(**made),
    }
    seconds = {name: [] for name in contestants}
    losses = {}
    for repeat in range(arguments.repeats + 1):
        for name, run in contestants.items():
            clock = run()
            losses[name] = clock.losses[-1]
            if repeat:  # the first round warms up
                seconds[name].append(clock.seconds)
    # Both are the mean over sequences of the mean reverse KL over all tokens; the logged losses have few digits, and in
    # bf16 TRL's logits are rounded to three.
    compared = (torch.tensor(losses[name]) for name in ("OPSD through our code", "TRL SDFTTrainer"))
    assert_parity("OPSD against TRL", *compared, 2e-3 if dtype_name == "fp32" else 5e-2)
    first = seconds["RMSD, 5 tokens a sequence"]
    return [
        Result(
            work=f"training step, {len(ROWS)} answers of {tokens} tokens, {dtype_name}",
            contestant=name,
            milliseconds=1e3 * statistics.median(taken),
            rate=tokens / statistics.median(taken),
            unit="tokens/s",
            times_ours=statistics.median(t / f for t, f in zip(taken, first, strict=True)),
            extra_megabytes=float("nan"),
            extra_percent=float("nan"),
            spread=spread(taken),
        )
        for name, taken in seconds.items()
    ]


def main() -> None:
    arguments = command_line(__doc__.splitlines()[0], [], dtypes=("fp32",), model=MODEL)
    with tempfile.TemporaryDirectory() as folder:
        results = [result for dtype_name in arguments.dtype for result in bench(dtype_name, arguments, folder)]
    report(results, arguments, "train_step")


if __name__ == "__main__":
    main()
