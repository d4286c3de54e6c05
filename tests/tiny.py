"""A tokenizer and causal LMs small enough to train in a test: random weights, real transformers architectures."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rmsd import MagnitudeJudge, RMSDConfig, RMSDTrainer

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "Which tool deploys services at Acme? The tool that deploys services at Acme is called zorblat. What is it?"


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.chat_template = CHAT
    return made


def shape() -> dict:
    """A config's common dimensions, small."""
    return dict(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )


def model(kind: str = "llama", seed: int = 0, **overrides):
    """A two-layer causal LM of a transformers architecture, in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**shape(), **overrides})).eval()


def loud(model, by=4.0):
    """With weights large enough for contexts to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(by)
    return model


ROWS = [
    {"prompt": "Which tool?", "privileged_context": "It is called zorblat."},
    {"prompt": "What is it?", "privileged_context": ""},
    {"prompt": [{"role": "user", "content": "Acme?"}], "privileged_context": "Say zorblat."},
    {"prompt": "Which services?", "privileged_context": "The tool zorblat."},
]


def trainer(tmp_path, student=None, callbacks=(), judge=None, evaluator=None, rows=None, called=None, **options):
    """An RMSDTrainer of a tiny model on ROWS; `options` are RMSDConfig's, `called` what answers may call."""
    defaults = dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_completion_length=6,
        vocab_topk=None,
        num_kept=3,
        min_gap=0.0,  # of a model of random weights they are small
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        lr_scheduler_type="constant",
        self_check=False,
    )
    return RMSDTrainer(
        student or model(),
        RMSDConfig(**{**defaults, **options}),
        rows or ROWS,
        tokenizer(),
        judge=judge or MagnitudeJudge(),
        evaluator=evaluator,
        callbacks=list(callbacks),
        **(called or {}),
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)
