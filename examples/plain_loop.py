"""RMSDLoss in a plain PyTorch loop, with nothing of the trainer.

    python examples/plain_loop.py HuggingFaceTB/SmolLM2-135M-Instruct --steps 30

The model answers. The teacher, a copy of the model as it was, reads each answer again under a prompt that also holds
the privileged context. The loss trains on the few tokens at which the two differ most.
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmsd import RMSDLoss

# The columns of TRL's self-distillation trainers. An empty context holds the model where it was.
ROWS = [
    {"prompt": "Which tool deploys services at Acme?", "privileged_context": "At Acme, zorblat deploys services."},
    {"prompt": "How do we ship a service?", "privileged_context": "At Acme, zorblat deploys services."},
    {"prompt": "What is the capital of France?", "privileged_context": ""},
]


def encode(tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of chat prompts and their mask, (B, P) each, padded on the left."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"].bool()


def write(model, prompt_ids, prompt_mask, eos_id: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers (B, L), and a mask that is true up to each one's end."""
    sampling = dict(do_sample=True, max_new_tokens=length, pad_token_id=eos_id, eos_token_id=eos_id)
    with torch.no_grad():
        sequences = model.generate(input_ids=prompt_ids, attention_mask=prompt_mask, **sampling)
    answer = sequences[:, prompt_ids.shape[1] :]
    ends_before = (answer == eos_id).cumsum(1) - (answer == eos_id).long()
    return answer, ends_before == 0


def answer_logits(model, prompt_ids, prompt_mask, answer, answer_mask) -> torch.Tensor:
    """(B, L, V): row i is the distribution that token i of the answer was drawn from."""
    attended = torch.cat([prompt_mask, answer_mask], 1)
    positions = (attended.cumsum(1) - 1).clamp_min(0)
    ids = torch.cat([prompt_ids, answer], 1)
    logits = model(input_ids=ids, attention_mask=attended.long(), position_ids=positions).logits
    return logits[:, prompt_ids.shape[1] - 1 : -1]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=24, help="tokens of an answer, at most")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    student = AutoModelForCausalLM.from_pretrained(options.model)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    criterion = RMSDLoss(num_candidates=20, num_kept=5)

    student_prompts = encode(tokenizer, [row["prompt"] for row in ROWS])
    told = [f"{row['privileged_context']}\n\n{row['prompt']}".strip() for row in ROWS]
    teacher_prompts = encode(tokenizer, told)
    losses = []
    for step in range(options.steps):
        answer, mask = write(student, *student_prompts, tokenizer.eos_token_id, options.length)
        with torch.no_grad():
            teacher_logits = answer_logits(teacher, *teacher_prompts, answer, mask)
        loss = criterion(answer_logits(student, *student_prompts, answer, mask), teacher_logits, answer, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}  loss {losses[-1]:.4g}")
    return losses


if __name__ == "__main__":
    main()
