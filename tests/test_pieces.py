"""What each token adds to a text, for tokenizers whose tokens are no text by themselves."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rmsd.answers.rollout import Rollouts
from rmsd.judge import ContextJudge
from rmsd.judge.pieces import Pieces
from rmsd.step.judging import questions_of
from rmsd.step.micro_batch import MicroBatch
from rmsd.step.wishes import Wishes
from rmsd_kernels import TokenScores

WORDS = ["\u2581It", "\u2581is", "\u2581zor", "bl", "at", "\u2581fine", "."]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a word's first token holds its space, which a decoder drops in front; bytes for the
    rest."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {word: 257 + i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def ids_of(tokenizer, *tokens) -> list[int]:
    """Of words by name and of other text by its bytes."""
    known = tokenizer.get_vocab()
    return [
        i
        for token in tokens
        for i in ([known[token]] if token in known else [known[f"<0x{byte:02X}>"] for byte in token.encode()])
    ]


def test_a_word_s_first_token_keeps_its_space():
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, "\u2581It", "\u2581is", "\u2581zor", "bl", "at", ".")
    assert tokenizer.batch_decode([[i] for i in ids])[1] == "is", "which is what this is about"
    pieces = Pieces(tokenizer, ids)
    assert pieces.texts == ["It", " is", " zor", "bl", "at", "."]
    fine, bl = ids_of(tokenizer, "\u2581fine", "bl")
    assert pieces.instead(2, fine) == " fine" and pieces.instead(2, bl) == "bl"
    assert pieces.instead(0, fine) == "fine"


def test_a_character_of_several_tokens_comes_with_its_last():
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, "\u2581It", "\u00fc", "at", "\U0001f642", ".")
    pieces = Pieces(tokenizer, ids)
    assert pieces.texts == ["It", "", "\u00fc", "at", "", "", "", "\U0001f642", "."]
    (bl,) = ids_of(tokenizer, "bl")
    assert pieces.instead(2, bl) in ("bl", "\ufffdbl"), "the byte before stays alone"
    assert pieces.instead(1, ids[1]) == "\ufffd", "no character yet"


@pytest.mark.parametrize("end", [1, 2, 3])
def test_an_answer_cut_within_a_character_still_joins_to_what_it_decodes_to(end):
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, "\u2581It", "\U0001f642")[: 1 + end]
    assert "".join(Pieces(tokenizer, ids).texts) == tokenizer.decode(ids)


@given(st.lists(st.sampled_from([*WORDS, "\u00fc", "\u65e5", "\U0001f642", "x", " ", "\n"]), max_size=30))
def test_the_pieces_join_to_the_decoded_whole(tokens):
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, *tokens)
    texts = Pieces(tokenizer, ids).texts
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)


@given(st.text(max_size=40).filter(lambda text: "\ufffd" not in text))
def test_a_byte_level_tokenizer_s_pieces_do_too(text):
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = Pieces(tokenizer, ids).texts
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)


def test_the_context_judge_keeps_a_sentencepiece_word_from_its_first_token():
    tokenizer = sentencepiece()
    ids = ids_of(tokenizer, "\u2581It", "\u2581is", "\u2581fine", ".")
    wish = ids_of(tokenizer, "\u2581zor")[0]
    length = len(ids)
    logprob = torch.zeros(1, length)
    scores = TokenScores(*(logprob - (2.0 if name == "teacher_logprob" else 0.0) for name in TokenScores._fields))
    candidates = torch.tensor([[2]])
    wishes = Wishes(*(torch.full((1, 1), wish) for _ in range(3)), None)
    row = {"prompt": "Which?", "privileged_context": "The tool is called zorblat."}
    rollouts = Rollouts([[1]], torch.tensor([ids]), torch.ones(1, length, dtype=torch.bool))
    batch = MicroBatch([row], [[1]], [[1]], rollouts=rollouts, scores=scores, candidates=candidates, wishes=wishes)
    (question,) = questions_of(batch, tokenizer, 5, min_gap=2.0)
    assert question.candidates[0].promoted == " zor" and question.candidates[0].token == " fine"
    assert ContextJudge()([question]) == [[2]]

    (question,) = questions_of(batch, tokenizer, 5, min_gap=2.1)
    assert not question.candidates, "its gap is of 2 nats"
    batch.rows = [{**row, "privileged_context": " "}]
    (question,) = questions_of(batch, tokenizer, 5, min_gap=2.1)
    assert question.candidates, "an anchor's candidates are drift, however small"
