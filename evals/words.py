"""Tokens and singulars without a language library.

Two public functions feed CHAIR's `pattern` parser and the emoji-scene evaluators:

* `tokenize` splits a lower-cased caption the way the published scorers do: Penn-Treebank conventions after a sentence
  split. Possessives and contractions become tokens of their own, punctuation is a token, hyphenated words, slashes and
  inner dots stay whole.
* `singular` removes plural endings from a word without looking at its neighbours, including the over-reductions of the
  rule set that the POPE paper scored with ("bus" loses its s, "glass" becomes "glas"): an evaluator that is kinder to
  the model than the published one gives other numbers.
"""

import re
from functools import lru_cache

# A dot that follows one of these does not end a sentence, so it stays on the word.
ABBREVIATIONS = frozenset("mr mrs ms dr st jr sr vs etc ft inc ltd co corp approx".split())
_NUMBER = re.compile(r"[\d:,.-]+")  # "10:15", and "1" before an item of a list
_INITIALS = re.compile(r"[a-z](\.[a-z])+")  # "u.s", "d.c"

# What a word may leave behind its apostrophe; split off as a token of its own when nothing else follows.
_CLITIC = re.compile(r"(?<=[^'])('s|'m|'d|'ll|'re|'ve|n't)$")
_QUOTED_LETTER = re.compile(r"'[a-z]")
# What may stand between the last dot of a text and its end.
_CLOSING = "\"'”’»)]}> \t\r\n"
# Fused pairs that the Treebank conventions always separate.
_FUSED = {"cannot": 3, "gonna": 3, "gotta": 3, "gimme": 3, "lemme": 3, "wanna": 3}

_SCANNER = re.compile(
    r"""
      \.{2,} | --                                 # an ellipsis or a dash is one token
    | [\]\[(){}<>"“”‘’«»„;@\#$%&?!*]              # always alone
    | `` | ''
    | [:,](?!\d)                                  # "10:30" and "3,000" stay whole
    | (?: (?! \.{2,} | -- | `` | '' | [:,](?!\d) )
          [^\s\]\[(){}<>"“”‘’«»„;@\#$%&?!*] )+      # everything else up to the next separator or blank
    """,
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Split `text` (lower-cased by the caller) into words and punctuation, in order."""
    tokens: list[str] = []
    end = len(text.rstrip(_CLOSING))
    for match in _SCANNER.finditer(text):
        piece = match.group()
        if piece[0].isalnum() and piece[-1].isalnum() and "'" not in piece and piece not in _FUSED:
            tokens.append(piece)
        elif any(character.isalnum() for character in piece):
            _split_piece(piece, tokens, last=match.end() >= end)
        else:
            tokens.append(piece)
    return tokens


def _split_piece(piece: str, tokens: list[str], last: bool) -> None:
    """Append `piece` to `tokens`, its final dot, closing quote and clitic separated."""
    tail: list[str] = []
    while piece[-1] in ".'":
        if piece[-1] == "." and not last and _keeps_dot(piece[:-1]):
            break
        tail.append(piece[-1])
        piece = piece[:-1]
    clitic = _CLITIC.search(piece)
    if clitic:
        tail.append(clitic.group())
        piece = piece[: clitic.start()]
    cut = 1 if _QUOTED_LETTER.fullmatch(piece) else _FUSED.get(piece)
    tokens.extend([piece[:cut], piece[cut:]] if cut else [piece])
    tokens.extend(reversed(tail))


def _keeps_dot(stem: str) -> bool:
    """Whether a dot after `stem` belongs to it although the text goes on: abbreviations, numbers, initials."""
    return stem in ABBREVIATIONS or _NUMBER.fullmatch(stem) is not None or _INITIALS.fullmatch(stem) is not None


# They end in s in the singular, or have no other form.
UNCHANGED = frozenset("news pants pliers scissors series shears species trousers headquarters".split())
IRREGULAR = {
    "people": "person",
    "men": "man",
    "children": "child",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "oxen": "ox",
    "loaves": "loaf",
    "leaves": "leaf",
    "thieves": "thief",
    "lives": "life",
    "wives": "wife",
    "wolves": "wolf",
}
# Compounds take the plural of their last part ("policemen", "grandchildren").
_COMPOUND = ("children", "people", "geese", "feet", "teeth", "mice", "men", "wives", "wolves", "leaves")
# Words in -ie; their plurals would otherwise be read as those of a word in -y ("movies" against "babies"). "ties" is
# left out on purpose: the published scorer makes it "ty", so a tie in the plural is never an object.
_IE = frozenset("birdie brownie calorie collie cookie doggie genie hoodie movie pixie prairie rookie smoothie".split())

# (ending, what replaces it), first match wins.
_ENDINGS: tuple[tuple[str, str], ...] = (
    ("quizzes", "quiz"),
    ("shoes", "shoe"),
    ("buses", "bus"),
    ("oes", "o"),
    ("xes", "x"),
    ("ches", "ch"),
    ("sses", "ss"),
    ("shes", "sh"),
    ("statuses", "status"),
    ("aliases", "alias"),
    ("knives", "knife"),
    ("calves", "calf"),
    ("halves", "half"),
    ("elves", "elf"),
    ("scarves", "scarf"),
    ("wharves", "wharf"),
)
_VOWELS = "aeiouy"


@lru_cache(maxsize=65536)
def singular(word: str) -> str:
    """The singular of a lower-case English noun, or what this rule set makes of any other word ("has" -> "ha")."""
    if word in UNCHANGED:
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    for plural in _COMPOUND:
        if word.endswith(plural):
            return word[: -len(plural)] + IRREGULAR[plural]
    if len(word) < 2 or not word.endswith("s"):
        return word
    for ending, replacement in _ENDINGS:
        if word.endswith(ending):
            return word[: -len(ending)] + replacement
    if word.endswith("ies"):
        if word[:-1] in _IE or len(word) < 4 or word[-4] in _VOWELS:
            return word[:-1]
        return word[:-3] + "y"
    return word[:-1]
