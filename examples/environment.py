"""RMSDTrainer with an environment: answers are episodes, whose calls are made as they are written.

    python examples/environment.py Qwen/Qwen3-0.6B --steps 30

The environment has the shape of TRL's GRPOTrainer: its public methods are the tools that the prompt shows. What it says
of a rollout afterwards (`feedback`) is what the teacher is told, so rows need no privileged context of their own.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from rmsd import RMSDConfig, RMSDTrainer

ROWS = [
    {"prompt": f"Order {count} {item} from the shop.", "privileged_context": "", "wanted": [item, count]}
    for item, count in (("pears", 36), ("plums", 12), ("figs", 24), ("limes", 60))
]


class Shop:
    """One rollout's shop, which counts in dozens and does not say so."""

    def reset(self, wanted: list, **row) -> None:
        self.wanted = list(wanted)
        self.ordered: list[list] = []

    def order(self, item: str, count: int) -> str:
        """Orders from the shop.

        Args:
            item: The item's name.
            count: How many.
        """
        self.ordered.append([item, 12 * count])
        return "ordered"

    def get_reward(self) -> float:
        return float(self.ordered == [self.wanted])

    def feedback(self) -> str:
        item, count = self.wanted
        return f"The shop counts in dozens: the right call is order(item={item!r}, count={count // 12})."


def main(arguments: list[str] | None = None) -> RMSDTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id, whose chat template shows tools")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=96, help="tokens of an episode, at most")
    parser.add_argument("--output", default="runs/environment")
    options = parser.parse_args(arguments)

    args = RMSDConfig(
        output_dir=options.output,
        max_steps=options.steps,
        max_turns=2,
        max_completion_length=options.length,
        per_device_train_batch_size=len(ROWS),
        threshold=0.1,  # nats; what differs by less is noise
        save_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = RMSDTrainer(model, args, ROWS, tokenizer, environment_factory=Shop)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
