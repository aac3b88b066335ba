"""Decoding token by token: text as soon as no later token can change it."""

from __future__ import annotations

from collections.abc import Sequence

from longwave.data.tokenizer import CLEANED, Tokenizer

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Decodes ids one by one; the pieces joined equal the decoding of all ids at once, without the prompt's part of it.

    prompt: the ids that the others continue. They matter, since decoders treat the beginning of a text specially:
        SentencePiece's drop the blank before its first word.
    One exception: with SentencePiece's byte fallback, bytes that are not valid UTF-8 may give a different number of
    U+FFFD than decoding at once does.
    """

    _FEW = 16  # tokens; only broken text has more of them between two whole characters

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # The ids whose text last ended with a whole character, and all after them. The former are kept since decoders
        # treat the start of a text specially.
        self._ids = [id for id in prompt if id not in tokenizer.special_ids][-self._FEW :]
        self._fresh = 0  # how many of the ids came after the text last ended with a whole character
        self._given = len(tokenizer.decode(self._ids))  # how many characters of the text of the ids were returned

    def push(self, id: int) -> str:
        """The text that `id` completes; bytes that may yet become a character are held back."""
        if id in self._tokenizer.special_ids:
            return ""
        self._ids.append(id)
        self._fresh += 1
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given : self._sure(text)]
        self._given += len(piece)
        if self._sure(text) == len(text):
            self._forget(self._fresh)
            self._fresh = 0
        elif self._fresh > 2 * self._FEW:
            self._forget(self._FEW)
            self._fresh = self._FEW
        return piece

    def finish(self) -> str:
        """The text still held back, half characters as U+FFFD; afterwards the decoder is as new."""
        piece = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._fresh, self._given = [], 0, 0
        return piece

    def _sure(self, text: str) -> int:
        """The number of leading characters that no later token can change.

        A half character shows as one to three U+FFFD at the end, so these are held back, but not broken text without
        end: of a long run of U+FFFD only the last three may still become a character.
        """
        if self._fresh > self._FEW and text.endswith(REPLACEMENT * 4):
            return len(text) - 3
        return len(text.rstrip(REPLACEMENT)) - self._blanks(text)

    def _blanks(self, text: str) -> int:
        """The number of characters at the end that a later token may show to begin with a blank to be taken out."""
        if not self._tokenizer.cleans:
            return 0
        beginnings = (spaced[:count] for spaced in CLEANED for count in range(1, len(spaced)))
        return max((len(one) for one in beginnings if text.endswith(one)), default=0)

    def _forget(self, keep: int) -> None:
        """Drops all but the last `keep` ids, which hold the text held back, so that the cost of a push never grows."""
        held_back = len(self._tokenizer.decode(self._ids)) - self._given
        self._ids = self._ids[-keep:]
        self._given = len(self._tokenizer.decode(self._ids)) - held_back
