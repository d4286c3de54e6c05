"""One of several processes that train with engine=vllm; tests/test_processes.py launches it, or runs it alone.

    python tests/vllm_ranks.py FOLDER ROLLOUTS_A_DEVICE ENGINE_SCORES

Leaves what the process ended in at FOLDER/RANK.pt.
"""

import gc
import sys
from pathlib import Path

import tiny
import torch
from vllm_cases import student, trainer

from rmsd.answers.vllm_engine import VLLMEngine
from rmsd.models.sharding import whole


def main(folder: Path, size: int, engine_scores: bool) -> None:
    made = trainer(
        folder,
        student(),
        engine_scores=engine_scores,
        max_steps=3,
        per_device_train_batch_size=size,
        learning_rate=1e-3,
        sampling_temperature=0,
    )
    before = tiny.weights(student())
    written, trained = [], []
    write, compute_loss = VLLMEngine.__call__, made.compute_loss

    def wrote(self, prompt_ids, **options):
        written.append(write(self, prompt_ids, **options))
        return written[-1]

    def computed(model, inputs, **options):
        trained.append(inputs["micro_batch"].rollouts)
        return compute_loss(model, inputs, **options)

    VLLMEngine.__call__, made.compute_loss = wrote, computed
    made.train()
    with whole(made.student):
        after = tiny.weights(made.student)
    made.engine = None
    gc.collect()
    ranks = made.accelerator.gather(torch.tensor([made.accelerator.process_index]))  # the group outlives the engine
    kept = {
        "ranks": ranks.tolist(),
        "changes": {name: after[name] - before[name] for name in before},
        "prompts": [rollouts.prompt_ids for rollouts in written],
        "trained on its own": all(any(mine is theirs for mine in written) for theirs in trained),
        "gaps": [entry["engine_gap"] for entry in made.state.log_history if "engine_gap" in entry],
    }
    torch.save(kept, folder / f"{made.accelerator.process_index}.pt")
    if len(kept["ranks"]) > 1:  # one process has no group but vLLM's, which ends it itself
        made.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True")
