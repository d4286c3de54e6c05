"""What each token adds to a text. A token decoded by itself is not that: a SentencePiece tokenizer drops the space it
begins with, and a byte-level one has characters of several tokens, of which each alone is no character."""

from collections.abc import Sequence

_INCOMPLETE = "\ufffd"  # how a decoder shows bytes that are not a character yet


class Pieces:
    """`texts[i]` is what token i adds, so that they join to the decoded whole; a token that only begins a character
    adds "", and the one that ends it the character."""

    def __init__(self, tokenizer, ids: Sequence[int]):
        self._tokenizer, self._ids = tokenizer, list(ids)
        self.texts: list[str] = []
        self._known: list[
            int
        ] = []  # the first of the tokens that `instead` decodes with token i, for what stands before
        start = end = 0  # of the last tokens whose text is complete: a decoder looks at the token before
        before = ""
        for i in range(len(self._ids)):
            self._known.append(start)
            text = self._decode(self._ids[start : i + 1])
            if text.endswith(_INCOMPLETE) and i + 1 < len(self._ids):
                self.texts.append("")
                continue
            self.texts.append(text[len(before) :])
            start, end = end, i + 1
            before = self._decode(self._ids[start:end])

    def instead(self, position: int, token_id: int) -> str:
        """What `token_id` would add at `position`; bytes that are no character yet as U+FFFD."""
        context = self._ids[self._known[position] : position]
        before = self._decode(context).rstrip(_INCOMPLETE)
        return self._decode([*context, token_id])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
