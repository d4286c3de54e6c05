"""What a trainer is given that it cannot train on or by: refused in one line that says what to give."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import trainer
from transformers import ProcessorMixin, T5Config, T5ForConditionalGeneration, TrainingArguments

from rmsd import RMSDConfig, RMSDTrainer

T5 = T5Config(vocab_size=300, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)


class Processor(ProcessorMixin):
    attributes = ("tokenizer",)
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: dict(model="some/name"), "model must be a loaded model, not 'some/name'"),
        (lambda: dict(model=T5ForConditionalGeneration(T5)), "is an encoder-decoder: the method needs a causal LM"),
        (lambda: dict(model=tiny.model().requires_grad_(False)), "no weight is trainable: every parameter is frozen"),
        (lambda: dict(processing_class=Processor(tiny.tokenizer())), "not a Processor: give its .tokenizer"),
        (lambda: dict(processing_class=None), "processing_class must be a tokenizer, not NoneType"),
        (lambda: dict(eval_dataset=tiny.ROWS), "takes no eval_dataset: evaluator=, a function of the model"),
        (lambda: dict(compute_metrics=len), "takes no compute_metrics: evaluator=, a function of the model"),
        (lambda: dict(compute_loss_func=len), "takes no compute_loss_func: RMSDConfig says what the loss is"),
        (lambda: dict(data_collator=list), "takes no data_collator: train_dataset's rows"),
        (lambda: dict(train_dataset=[]), "train_dataset holds no rows"),
        (lambda: dict(train_dataset="rows.jsonl"), "not a path: rmsd.answers.data.load_rows"),
        (lambda: dict(train_dataset={"train": tiny.ROWS, "test": []}), "one split, not a dict of train, test"),
        (lambda: dict(train_dataset=iter(tiny.ROWS)), "must have a length and rows by number, which a list_iterator"),
    ],
)
def test_what_is_no_model_tokenizer_or_data_is_refused(tmp_path, wrong, message):
    given = dict(
        model=tiny.model(),
        args=RMSDConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1),
        train_dataset=tiny.ROWS,
        processing_class=tiny.tokenizer(),
    )
    with pytest.raises((TypeError, ValueError), match=message) as error:
        RMSDTrainer(**{**given, **wrong()})
    assert "\n" not in str(error.value)


def test_arguments_of_transformers_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    with pytest.raises(TypeError, match="args must be an RMSDConfig, not TrainingArguments"):
        RMSDTrainer(tiny.model(), args, tiny.ROWS, tiny.tokenizer())


@pytest.mark.parametrize("options", [{"eval_strategy": "epoch"}, {"eval_on_start": True}])
def test_an_evaluation_without_an_evaluator_is_refused_before_the_run(tmp_path, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={str(value).lower()} needs an evaluator: RMSDTrainer"):
        trainer(tmp_path, **options)


class Endless(torch.utils.data.Dataset):
    """As many datasets of torch: a length, and no end for who counts on without it."""

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return tiny.ROWS[number % 4]


def test_a_dataset_is_read_by_its_length_and_a_stream_is_refused(tmp_path):
    trainer(tmp_path, rows=Endless(), max_steps=1).train()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield tiny.ROWS[0]

    with pytest.raises(ValueError, match="which a Stream has not: give a list"):
        trainer(tmp_path, rows=Stream())


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny.model(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer(tmp_path, PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter"))
    trainer(tmp_path, PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True))


def test_ids_behind_the_embedding_are_refused(tmp_path, monkeypatch):
    padded = copy.deepcopy(tiny.tokenizer())
    padded.add_special_tokens({"pad_token": "[PAD]"})
    template = padded.chat_template.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    thinking = copy.deepcopy(tiny.tokenizer())
    thinking.add_tokens(["<think>"], special_tokens=True)
    thinking.chat_template = template
    students = tiny.model(), tiny.model()  # as wide as the tokenizer was
    messages = "pad token has id 300", "row 0: the prompt holds token id 300"
    for student, tokenizer, message in zip(students, (padded, thinking), messages, strict=True):
        monkeypatch.setattr(tiny, "tokenizer", lambda tokenizer=tokenizer: tokenizer)
        with pytest.raises(ValueError, match=message) as error:
            trainer(tmp_path, student)
        assert "resize_token_embeddings" in str(error.value)
        student.resize_token_embeddings(len(tokenizer))
        trainer(tmp_path, student, max_steps=1).train()


def test_what_changes_before_the_first_step_is_read_then(tmp_path):
    tokenizer, student = copy.deepcopy(tiny.tokenizer()), tiny.model("gemma2", final_logit_softcapping=None)
    made = trainer(tmp_path, student, max_steps=1)
    made.processing_class = tokenizer
    tokenizer.pad_token = "<|system|>"
    for model in (student, made.teacher.model):
        model.config.final_logit_softcapping = 2.0
    made.train()
    assert made.pad_id == tokenizer.pad_token_id != tiny.tokenizer().pad_token_id
    assert made.student_head().softcap == made.teacher.head.softcap == 2.0
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match="pad token has id 300"):
        made.train()
