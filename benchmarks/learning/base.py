"""The base models: Llamas of under a million parameters, pre-trained on the corpus until they follow hints. Each seed
gives another one, by its first weights and the order of its documents."""

import hashlib
import json
import random
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from . import corpus, muon
from .corpus import World, skill
from .muon import Muon

CONFIG = dict(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=128,
    copying_steps=200,
    steps=1200,
    batch_size=64,
    learning_rate=3e-3,
    muon_rate=0.02,
    warmup=50,
)


def load(cache: Path, seed: int, threads: int = 1, **changes) -> tuple[LlamaForCausalLM, World]:
    """The seed's base model in eval mode, of CONFIG with its `changes`, from the cache when the corpus, the
    configuration and the number of threads that it is pre-trained with, which decides its last bits, are what they
    were."""
    world, config = World(), {**CONFIG, **changes}
    key = "" if threads == 1 else f"{threads} threads"
    key += json.dumps(config) + "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (corpus, muon))
    folder = cache / f"base-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").exists():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        model, seconds = pretrain(world, seed, config)
        torch.set_num_threads(before)
        partial = folder.with_name(f"{folder.name}.partial")
        model.save_pretrained(partial)
        (partial / "seconds.json").write_text(json.dumps(seconds))
        partial.rename(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval(), world


def pretrain(world: World, seed: int, config: dict = CONFIG) -> tuple[LlamaForCausalLM, float]:
    """(model, seconds)."""
    torch.manual_seed(seed)
    shape = {name: config[name] for name in list(CONFIG)[:5]}
    tokenizer = world.tokenizer
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            **shape,
        )
    )
    steps, warmup = config["steps"], config["warmup"]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, config["muon_rate"]),
        torch.optim.AdamW(others, config["learning_rate"], betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 1.0) * max(1.0 - step / steps, 0.02)
        )
        for optimizer in optimizers
    ]
    started, rng = time.monotonic(), random.Random(seed)
    batches = _batches(world, rng)
    held_out = _held_out(world)
    for step in range(steps):
        loss = answer_loss(model, *(_copying(world, rng) if step < config["copying_steps"] else next(batches)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 100 == 99:
            kinds = ", ".join(f"{kind} {_loss_on(model, batch):.3f}" for kind, batch in held_out.items())
            print(
                f"pre-training base {seed}, {step + 1}/{steps}, {time.monotonic() - started:.0f} s: {kinds}", flush=True
            )
    return model.eval(), time.monotonic() - started


def answer_loss(model, ids, labels) -> torch.Tensor:
    """Cross entropy of the answers' tokens, from (B, L) ids padded on the right, and labels (-100: not asked for)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def collate(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), each (B, L), of prompts with their answers; padding on the right, which causal attention
    ignores."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([answer for _, answer in pairs])["input_ids"]]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _held_out(world: World, count: int = 500) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Documents by kind that are unlikely to be met in training."""
    rng, found = random.Random("held out"), {}
    for _ in range(count):
        document = world.document(rng)
        kind = document.prompt.split()[0] if document.kind == "skill" else document.kind
        found.setdefault(kind, []).append(document[:2])
    return {kind: collate(world.tokenizer, found[kind]) for kind in sorted(found)}


@torch.no_grad()
def _loss_on(model, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    return answer_loss(model, *batch).item()


def _copying(world: World, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Words to copy and nothing else. Copying is what following a hint is made of: learned first it takes 200 short
    steps; in the whole corpus it had not begun after 500 long ones."""
    return collate(world.tokenizer, [skill("copy", rng) for _ in range(CONFIG["batch_size"])])


def _batches(world: World, rng: random.Random, pool: int = 16):
    """Batches of documents of like length, so that little of a batch is padding."""
    size = CONFIG["batch_size"]
    while True:
        documents = [world.document(rng) for _ in range(size * pool)]
        documents.sort(key=lambda document: len(document.prompt) + len(document.answer))
        starts = list(range(0, len(documents), size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(world.tokenizer, [document[:2] for document in documents[start : start + size]])
