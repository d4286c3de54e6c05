"""Hidden states and heads: every supported way from one to logits, and a refusal for the others."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rmsd.answers.rollout import eos_ids_of, generate
from rmsd.answers.sampling import Draw
from rmsd.models.heads import OutputHead
from rmsd.models.hidden import completion_hidden

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
ARCHITECTURES = {
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "untied": ("llama", dict(tie_word_embeddings=False)),
    "softcapped": ("gemma2", dict(final_logit_softcapping=5.0)),
    "scaled": ("cohere", dict(logit_scale=0.25)),
    "divided": ("granite", dict(logits_scaling=4.0)),
    "qwen3": ("qwen3", dict()),
    "a layer before the head": ("bert", dict(is_decoder=True)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_rebuilds_the_models_own_logits_at_the_completion(name):
    kind, overrides = ARCHITECTURES[name]
    model = tiny.model(kind, **overrides)
    head = OutputHead.of(model)
    prompts = [[7, 8, 9], [10, 11, 12, 13, 14]]  # of two lengths: padded on the left
    completion = torch.tensor([[20, 21, 22, 23], [30, 31, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        logits = head(completion_hidden(model, prompts, completion, mask, pad_id=0))
        for b, prompt in enumerate(prompts):
            length = int(mask[b].sum())
            alone = model(torch.tensor([prompt + completion[b, :length].tolist()])).logits
            torch.testing.assert_close(logits[b, :length], alone[0, len(prompt) - 1 : -1], rtol=1e-4, atol=1e-5)


def test_a_soft_cap_may_have_another_name():
    model = tiny.loud(tiny.model("recurrent_gemma", num_hidden_layers=3, lru_width=32, logits_soft_cap=1.0))
    assert OutputHead.of(model).softcap == 1.0


def test_a_decoder_under_another_name_is_not_needed():
    model = tiny.model()
    expected = OutputHead.of(model)
    model.get_decoder = lambda: model  # as transformers answers where it finds none
    assert OutputHead.of(model).transform == expected.transform
    rollouts = generate(model, [[7, 8], [9, 10, 11]], max_new_tokens=6, pad_id=0, eos_ids=[0], seed=3)
    hidden = completion_hidden(model, rollouts.prompt_ids, rollouts.completion_ids, rollouts.completion_mask, 0)
    torch.testing.assert_close(hidden[rollouts.completion_mask], rollouts.student_hidden[rollouts.completion_mask])
    del model.get_decoder
    OutputHead.of(model)
    again = completion_hidden(model, rollouts.prompt_ids, rollouts.completion_ids, rollouts.completion_mask, 0)
    torch.testing.assert_close(hidden[rollouts.completion_mask], again[rollouts.completion_mask])


def test_a_model_whose_own_forward_fails_is_refused_by_name(monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(model, "forward", lambda **inputs: {}["full_attention"])
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM's own forward fails: KeyError: 'full_attention'$"):
        OutputHead.of(model)


def test_head_of_an_unknown_form_is_refused_by_name():
    model = tiny.model()
    forward = type(model).forward

    def shifted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.exp()
        return output

    model.forward = shifted.__get__(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not compute"):
        OutputHead.of(model)


def test_rollouts_record_the_hidden_state_each_token_was_drawn_from():
    model = tiny.model()
    rollouts = generate(model, [[7, 8], [9, 10, 11]], max_new_tokens=6, pad_id=0, eos_ids=[0], temperature=1.0, seed=3)
    again = completion_hidden(model, rollouts.prompt_ids, rollouts.completion_ids, rollouts.completion_mask, pad_id=0)
    mask = rollouts.completion_mask
    torch.testing.assert_close(rollouts.student_hidden[mask], again[mask], rtol=1e-4, atol=1e-5)


def test_greedy_rollout_takes_the_heads_argmax():
    model = tiny.model()
    rollouts = generate(model, [[7, 8], [9, 10, 11]], max_new_tokens=6, pad_id=0, eos_ids=[0], temperature=0)
    logits = OutputHead.of(model)(rollouts.student_hidden)
    mask = rollouts.completion_mask
    assert torch.equal(logits.argmax(-1)[mask], rollouts.completion_ids[mask])


@pytest.mark.parametrize("kind", ["plain", "peft", "peft with one of its own"])
def test_answers_are_drawn_from_what_is_scored_whatever_the_generation_config_says(kind):
    plain = tiny.model()
    model = plain if kind == "plain" else get_peft_model(plain, LORA)
    own = GenerationConfig(
        repetition_penalty=1.3, no_repeat_ngram_size=2, suppress_tokens=[226], min_new_tokens=12, min_p=0.9
    )
    (model if kind.endswith("own") else plain).generation_config = own
    prompts, options = [[7, 8], [9, 10, 11]], dict(max_new_tokens=12, pad_id=0, eos_ids=[0])
    greedy = generate(model, prompts, temperature=0, **options)
    mask = greedy.completion_mask
    assert torch.equal(OutputHead.of(model)(greedy.student_hidden).argmax(-1)[mask], greedy.completion_ids[mask])
    sampled = generate(model, prompts, seed=5, **options)
    bare = generate(tiny.model(), prompts, seed=5, **options)
    assert torch.equal(sampled.completion_ids, bare.completion_ids)
    assert model.generation_config is own, "as it was found"


def test_greedy_rollouts_are_those_of_transformers_generate():
    model, ids = tiny.model(), torch.tensor([[7, 8, 9]])
    options = dict(max_new_tokens=8, pad_token_id=0, eos_token_id=[0], do_sample=False)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 3:]
    got = generate(model, ids.tolist(), max_new_tokens=8, pad_id=0, eos_ids=[0], temperature=0.0)
    assert torch.equal(got.completion_ids, expected)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.8, 0), (2.0, 1.0, 3)])
def test_tokens_are_drawn_from_the_distribution_that_the_options_say(temperature, top_p, top_k):
    """4,000 draws of one token beside the probabilities that transformers' own warpers give."""
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, -1] = -torch.inf
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k or 12)(None, warped))
    draw = Draw(range(4000), 1, "cpu", temperature=temperature, top_p=top_p, top_k=top_k)
    drawn = draw(None, logits.repeat(4000, 1)).argmax(-1).bincount(minlength=12) / 4000
    expected = warped.softmax(-1)[0]
    assert (drawn - expected).abs().max() < 3 * 0.5 / 4000**0.5
    assert (drawn[expected == 0] == 0).all()


def test_an_answer_is_drawn_by_its_own_seed_whatever_else_is_in_the_batch():
    model, prompts, seeds = tiny.model(initializer_range=0.2), [[7, 8], [9, 10, 11], [12], [7, 8]], [5, 6, 2**63 - 1, 8]
    options = dict(max_new_tokens=8, pad_id=0, eos_ids=[0], temperature=0.9, top_p=0.95, top_k=50)
    together = generate(model, prompts, seed=seeds, **options)
    for b in (3, 0, 2, 1):
        alone = generate(model, [prompts[b]], seed=[seeds[b]], **options)
        mask = together.completion_mask[b]
        assert alone.completion_ids[0].tolist() == together.completion_ids[b][mask].tolist()
    assert together.completion_ids[0].tolist() != together.completion_ids[3].tolist(), "one prompt, two seeds"
    with pytest.raises(ValueError, match="one for each of 4 answers, not 2"):
        generate(model, prompts, seed=[1, 2], **options)


def test_completion_ends_with_its_first_end_token():
    model = tiny.model()
    eos = list(range(0, 150))  # half of the vocabulary ends an answer: it comes soon
    rollouts = generate(model, [[160]] * 16, max_new_tokens=12, pad_id=0, eos_ids=eos, temperature=2.0, seed=0)
    for ids, mask in zip(rollouts.completion_ids.tolist(), rollouts.completion_mask.tolist(), strict=True):
        ends = [i for i, token in enumerate(ids) if token in eos]
        length = ends[0] + 1 if ends else len(ids)
        assert mask == [i < length for i in range(len(ids))]
    assert not rollouts.completion_mask.all(), "the case under test occurs"


def test_seeded_rollouts_neither_read_nor_move_the_global_random_state():
    model = tiny.model()
    options = dict(max_new_tokens=8, pad_id=0, eos_ids=[0], temperature=1.0)
    state = torch.get_rng_state()
    first = generate(model, [[7, 8]], seed=5, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(generate(model, [[7, 8]], seed=5, **options).completion_ids, first.completion_ids)
    assert not torch.equal(generate(model, [[7, 8]], seed=6, **options).completion_ids, first.completion_ids)


def test_end_tokens_are_the_generation_configs_and_the_tokenizers():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.generation_config.eos_token_id = [3, 4]
    assert eos_ids_of(model, tokenizer) == [tokenizer.eos_token_id, 3, 4]
    model.generation_config.eos_token_id = None
    assert eos_ids_of(model, tokenizer) == [tokenizer.eos_token_id]


def without_tokens(monkeypatch, *names):
    """tiny's tokenizer lacks them, and so do its models."""
    lacking = copy.deepcopy(tiny.tokenizer())
    for name in names:
        setattr(lacking, name, None)
    monkeypatch.setattr(tiny, "tokenizer", lambda: lacking)


def test_without_a_pad_token_the_end_token_pads(tmp_path, monkeypatch):
    student, padded = tiny.model(), tiny.trainer(tmp_path)
    assert padded.pad_id == tiny.tokenizer().eos_token_id
    padded.train()
    without_tokens(monkeypatch, "pad_token")
    tiny.trainer(tmp_path, student).train()
    assert tiny.same(tiny.weights(padded.model), tiny.weights(student))


def test_without_an_end_token_answers_are_as_long_as_they_may_get(tmp_path, monkeypatch):
    without_tokens(monkeypatch, "eos_token")
    made = tiny.trainer(tmp_path, max_steps=1)
    made.train()
    assert made.state.log_history[0]["rollout_tokens"] == 4 * 6
    without_tokens(monkeypatch, "eos_token", "pad_token")
    with pytest.raises(ValueError, match=r"no pad token and no end-of-sequence token: set tokenizer.pad_token"):
        tiny.trainer(tmp_path)
