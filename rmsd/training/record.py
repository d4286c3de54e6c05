"""What a run leaves for its reader: metrics.jsonl and rollouts.jsonl, one JSON object a line."""

import json
import math
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..judge import Question
from ..step.micro_batch import MicroBatch

# What a push to the Hub leaves here, in the words of the .gitignore that the Hub heeds: files that hold prompts and
# privileged contexts, and folders of models: one whose files lie beside it already, and what a vLLM server is sent.
KEPT_FROM_THE_HUB = ("rollouts.jsonl", "report.html", "model/", "engine/")


class RunRecord(TrainerCallback):
    """Writes every log entry and the rollouts it is given. On resume, lines of steps after the checkpoint are dropped:
    those steps are about to be made again. Where the run is pushed to the Hub, the rollouts stay here."""

    def __init__(self, output_dir: str | Path, resume: bool = False):
        self.directory = Path(output_dir)
        self.resume = resume

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            path = self.directory / name
            lines = read_lines(path) if self.resume or state.global_step else []
            kept = [line for line in lines if line["step"] <= state.global_step]
            # Whole or not at all: a run killed here must find its lines again.
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            partial.replace(path)
        ignored = self.directory / ".gitignore"
        if args.push_to_hub and not ignored.exists():
            ignored.write_text("\n".join(KEPT_FROM_THE_HUB) + "\n", encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        kinds = {"continuation": "continuation", "rolled_back_from": "rollback", "loss": "train"}
        kind = next((kind for name, kind in kinds.items() if name in logs), "eval")
        line = {"kind": kind, "step": state.global_step}
        line |= {name.removeprefix("eval_"): value for name, value in logs.items() if isinstance(value, int | float)}
        self._append("metrics.jsonl", line)

    def rollouts(self, lines: list[dict]) -> None:
        for line in lines:
            self._append("rollouts.jsonl", line)

    def _append(self, name: str, line: dict) -> None:
        try:
            with (self.directory / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"{self.directory / name} could not be written: {error}") from error


def rollout_lines(step: int, batch: MicroBatch, number: int) -> list[dict]:
    """The first `number` rollouts of a micro-batch that has been judged, as lines of rollouts.jsonl.

    `unwritten` lists the positions that the student did not write, as a tool's turn: they have no scores, and null
    stands in each column. Null at any other position is a score that was not finite. A score that is not known at all,
    as the divergence where an engine scored, is no column. `guided` is true of an answer that the told teacher wrote.
    `teacher_prompt` is the whole of what the teacher read as text, as a judge is shown it; "" where that is not known.
    """
    questions = batch.questions[:number]
    mask = batch.rollouts.on_host.completion_mask[:number]
    columns = {name: scores[:number].where(mask, torch.nan).tolist() for name, scores in batch.host_scores.items()}
    written = mask.tolist()
    return [
        {
            "step": step,
            "prompt": question.prompt,
            "privileged_context": question.privileged_context,
            "teacher_prompt": question.teacher_prompt,
            "tokens": list(question.tokens),
            **{name: finite(column[b][: len(question.tokens)]) for name, column in columns.items()},
            "unwritten": [i for i in range(len(question.tokens)) if not written[b][i]],
            **({"episode": batch.episodes[b].numbers} if batch.episodes else {}),
            **({"guided": True} if b in (batch.guided or ()) else {}),
            "candidates": [candidate.position for candidate in question.candidates],
            "kept": list(batch.kept[b]),
            "preferred": {candidate.position: candidate.promoted for candidate in question.candidates},
            **_contrast(question),
        }
        for b, question in enumerate(questions)
    ]


def _contrast(question: Question) -> dict:
    """The candidates' contrast by position; no column where nothing was read under a contrast context."""
    nats = {candidate.position: candidate.contrast for candidate in question.candidates}
    if all(value is None or math.isnan(value) for value in nats.values()):
        return {}
    return {"contrast": dict(zip(nats, finite(nats.values()), strict=True))}


def read_lines(path: Path) -> list[dict]:
    """Every whole line of a JSONL file; a torn last one, left by a kill, is not."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def finite(values) -> list[float | None]:
    """JSON has no infinity: None stands for what is not finite."""
    return [round(value, 5) if math.isfinite(value) else None for value in values]
