"""From tokens, as they come, to text that never has to be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What a tokenizer says for the first bytes of a character.
_UNFINISHED = "\ufffd"


class Text:
    """The text of an answer, piece by piece.

    Args:
        tokenizer: decodes the tokens; special ones are left out.
        stops: the answer ends before the first of these, wherever it appears.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        #: The tokens that were needed, an end token among them.
        self.tokens: list[int] = []
        #: What was given out so far.
        self.sent = ""
        #: Whether a stop string ended it; further tokens are of no use.
        self.stopped = False
        # Such tokenizers join what they had put apart, once they see what follows.
        self._joins = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """What is certain to follow :attr:`sent`; with ``last`` all that is left."""
        # One by one where stop strings are looked for, so that no token after one is counted.
        for some in [[token] for token in tokens] if self._stops else [list(tokens)]:
            self.tokens += some
            # The blank before the first word belongs to its token and not to the answer.
            whole = self._tokenizer.decode(self.tokens, skip_special_tokens=True).removeprefix(" ")
            places = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
            if places:
                self.stopped, whole = True, whole[: min(places)]
                break
        if not self.tokens:
            return ""
        certain = whole if last or self.stopped else self._certain(whole)
        new = certain[len(self.sent) :]
        self.sent += new
        return new

    def _certain(self, whole: str) -> str:
        """``whole`` without an end that further tokens may change."""
        end = len(whole.rstrip(_UNFINISHED))
        for stop in self._stops:
            for length in range(min(len(stop) - 1, end), 0, -1):
                if whole[:end].endswith(stop[:length]):
                    end -= length
                    break
        if self._joins:
            end = max(whole.rfind(" ", 0, end), 0)
        return whole[:end]
