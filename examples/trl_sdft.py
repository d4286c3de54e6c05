"""TRL's SDFTTrainer with the loss of this project: candidates, a judge, and a divergence on what is kept.

    pip install trl
    python examples/trl_sdft.py HuggingFaceTB/SmolLM2-135M-Instruct --steps 30

Rollouts, the teacher, its prompts and the data's columns stay TRL's. The class overrides the two methods at which rows
become a batch and logits a loss; both are internal to TRL, so this is for the version that constraints.txt pins.
"""

import argparse
from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from rmsd import Candidate, ContextJudge, Judge, Question, RMSDLoss

CONTEXT = "At Acme, the tool that deploys services is called zorblat."
ROWS = [
    {"prompt": "Which tool deploys services at Acme?", "privileged_context": CONTEXT},
    {"prompt": "How do we ship a service?", "privileged_context": CONTEXT},
]


class RMSDSDFTTrainer(SDFTTrainer):
    """SDFTTrainer that trains on the tokens which `judge` keeps of the candidates of `loss`."""

    def __init__(self, *args, judge: Judge, loss: RMSDLoss, **kwargs):
        super().__init__(*args, **kwargs)
        self.judge, self.rmsd_loss = judge, loss.to(self.args.device)

    def _prepare_training_batch(self, inputs):
        return super()._prepare_training_batch(inputs) | {"rows": inputs}

    def _compute_self_distillation_loss(self, model, inputs, distillation_logits):
        student, teacher = distillation_logits.student_logits, distillation_logits.teacher_logits
        ids, mask = distillation_logits.completion_ids, distillation_logits.loss_mask.bool()
        with torch.no_grad():
            scores, candidates = self.rmsd_loss.candidates(student, teacher, ids, mask)
            gap = scores.teacher_logprob - scores.student_logprob
            questions = list(self.questions(inputs["rows"], ids, candidates, gap, student, teacher))
        keep = torch.zeros(mask.shape, dtype=torch.bool)
        for row, positions in zip(keep, self.judge(questions), strict=True):
            row[positions] = True
        loss = self.rmsd_loss(student, teacher, ids, mask, keep)
        self._metrics["train"]["rmsd/kept_tokens"].append(keep.sum().item())
        self._log_self_distillation_metric("train", self.accelerator.gather(loss.detach()).mean().item())
        return loss

    def questions(self, rows, ids, candidates, gap, student, teacher) -> Iterator[Question]:
        """What the judge reads of each answer: its text, and what either model would write at the candidates."""
        text = self._tokenizer.decode
        for b, row in enumerate(rows):
            positions = candidates[b][candidates[b] >= 0]
            log_p, log_q = (logits[b, positions].float().log_softmax(-1) for logits in (student, teacher))
            promoted = (log_q.exp() * (log_q - log_p)).argmax(-1)
            preferred = zip(positions.tolist(), promoted, log_p.argmax(-1), log_q.argmax(-1), strict=True)
            tokens = tuple(text([i]) for i in ids[b].tolist())
            found = tuple(
                Candidate(i, tokens[i], text(v), text(p), text(q), gap[b, i].item()) for i, v, p, q in preferred
            )
            yield Question(row["prompt"], row["privileged_context"], tokens, found, self.rmsd_loss.num_kept)


def main(arguments: list[str] | None = None) -> RMSDSDFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=24, help="tokens of an answer, at most")
    parser.add_argument("--output", default="runs/trl_sdft")
    options = parser.parse_args(arguments)

    args = SDFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        max_completion_length=options.length,
        per_device_train_batch_size=4,
        num_generations=2,
        learning_rate=5e-5,
        teacher_model_kind="base",
        teacher_prompt_template="{privileged_context}\n\n{prompt}",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
    )
    trainer = RMSDSDFTTrainer(
        options.model,
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        judge=ContextJudge(row["prompt"] for row in ROWS),
        loss=RMSDLoss(num_candidates=20, num_kept=5),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
