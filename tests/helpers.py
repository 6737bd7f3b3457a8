"""What several test files share beside what ``lvlm_decode.testing`` has."""

from lvlm_decode.engine.recorder import Recorder

#: Letters of the tiny tokenizers that end a trial of CNTP, frequent enough for short answers.
MARKS = "aeiou.,AEIOU01234#"


class TextProcessor:
    """A tokenizer and nothing else, as a processor without a chat template."""

    chat_template = None

    def __init__(self, built):
        self.tokenizer = self.qformer_tokenizer = built.tokenizer


class Kept(Recorder):
    """Keeps the newest run, with all its tensors; ``run.lanes`` counts forwards and holds the newest :class:`Step`."""

    run = None

    def began(self, run):
        self.run = run
