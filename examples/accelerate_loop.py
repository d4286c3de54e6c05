"""The plain loop on any number of processes, by accelerate: the loss is that of the whole batch.

    accelerate launch examples/accelerate_loop.py HuggingFaceTB/SmolLM2-135M-Instruct --steps 30

The loss is a mean over the sequences that keep a token, wherever they are. So their number is counted over all
processes first, and each adds its share; DistributedDataParallel averages gradients, hence the factor.
"""

import argparse
import copy

import torch
from accelerate import Accelerator
from plain_loop import ROWS, answer_logits, encode, write
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmsd import RMSDLoss


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=24, help="tokens of an answer, at most")
    parser.add_argument("--rows", type=int, default=4, help="prompts a step and process")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--output", help="where the trained model goes")
    options = parser.parse_args(arguments)

    accelerator = Accelerator()
    torch.manual_seed(accelerator.process_index)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    student = AutoModelForCausalLM.from_pretrained(options.model)
    teacher = copy.deepcopy(student).requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    loader = DataLoader(ROWS * options.rows, batch_size=options.rows, shuffle=True, collate_fn=list)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    criterion = RMSDLoss(num_candidates=20, num_kept=5)

    def batches():
        while True:
            yield from loader

    for step, rows in zip(range(options.steps), batches(), strict=False):
        told = [f"{row['privileged_context']}\n\n{row['prompt']}".strip() for row in rows]
        read, read_mask = (tensor.to(accelerator.device) for tensor in encode(tokenizer, [r["prompt"] for r in rows]))
        told_ids, told_mask = (tensor.to(accelerator.device) for tensor in encode(tokenizer, told))
        answer, mask = write(accelerator.unwrap_model(student), read, read_mask, tokenizer.eos_token_id, options.length)
        with torch.no_grad():
            teacher_logits = answer_logits(teacher, told_ids, told_mask, answer, mask)
        student_logits = answer_logits(student, read, read_mask, answer, mask)
        _, candidates = criterion.candidates(student_logits, teacher_logits, answer, mask)
        keep = torch.zeros(len(rows), answer.shape[1] + 1, dtype=torch.bool, device=answer.device)
        keep = keep.scatter(1, candidates[:, : criterion.num_kept] % keep.shape[1], True)[:, :-1]  # -1 is no position
        sequences = accelerator.reduce(keep.any(1).sum().float())
        loss = criterion(student_logits, teacher_logits, answer, mask, keep, num_sequences=sequences)
        accelerator.backward(loss * accelerator.num_processes)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1}  loss {accelerator.reduce(loss.detach()).item():.4g}")
    if options.output:
        accelerator.unwrap_model(student).save_pretrained(options.output, is_main_process=accelerator.is_main_process)
    return accelerator.unwrap_model(student)


if __name__ == "__main__":
    main()
