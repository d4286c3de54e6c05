"""RMSDTrainer with a judge of one's own, trackers and the Hub.

    python examples/own_judge.py HuggingFaceTB/SmolLM2-135M-Instruct --report-to tensorboard
    accelerate launch examples/own_judge.py MODEL --hub me/my-model --report-to trackio wandb

A judge is whatever can be called with questions and answers, for each, the positions to keep. This one is told which
words matter. `--hub` pushes the model and a card to the Hub.
"""

import argparse
from collections.abc import Sequence

from plain_loop import ROWS
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmsd import Question, RMSDConfig, RMSDTrainer


class WordJudge:
    """Keeps a candidate where the teacher would write the beginning of one of `words`."""

    def __init__(self, *words: str):
        self.words = [word.casefold() for word in words]

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        return [[c.position for c in q.candidates if self.wanted(c.promoted)][: q.max_kept] for q in questions]

    def wanted(self, token: str) -> bool:
        token = token.strip().casefold()
        return bool(token) and any(word.startswith(token) for word in self.words)


def main(arguments: list[str] | None = None) -> RMSDTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--words", nargs="+", default=["zorblat"], help="what the judge looks for")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=24, help="tokens of an answer, at most")
    parser.add_argument("--output", default="runs/own_judge")
    parser.add_argument("--report-to", nargs="+", default=["none"], help="tensorboard, trackio, wandb, ...")
    parser.add_argument("--hub", help="push to this repository of the Hub at the end")
    options = parser.parse_args(arguments)

    args = RMSDConfig(
        output_dir=options.output,
        max_steps=options.steps,
        max_completion_length=options.length,
        per_device_train_batch_size=len(ROWS),
        learning_rate=5e-5,
        threshold=0.1,  # nats; what differs by less is noise, for a judge and for an anchor
        save_strategy="no",
        report_to=options.report_to,
        push_to_hub=options.hub is not None,
        hub_model_id=options.hub,
    )
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = RMSDTrainer(model, args, ROWS, tokenizer, judge=WordJudge(*options.words))
    trainer.train()
    if options.hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
