"""Reading yes or no out of an answer, by name of the rule. The rule matters more than most decoding methods.

Each rule is a pure function `(text, label) -> (verdict, clear)`. Verdict is "yes", "no" or "other". `clear` is False
when the rule found nothing that says its verdict and fell back to its default: such answers are the unparsed share of
a table. Behaviour follows the scoring scripts of the repositories named; all were checked on recorded answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lvlm_decode.errors import UnknownNameError

from .base import Answer, Row

Verdict = tuple[str, bool]
_WORD = re.compile(r"[a-z]+")


def _says(word: str, text: str) -> bool:
    return word in _WORD.findall(text.lower())


def _negative_else_yes(negative: bool, text: str) -> Verdict:
    """No when a negative was found; else yes, which is clear only if the answer says so."""
    return ("no", True) if negative else ("yes", _says("yes", text))


def pope_official(text: str, label: str) -> Verdict:
    """POPE's evaluate.py and LLaVA's eval_pope: first sentence; a token No, not or no means no; anything else yes."""
    tokens = text.split(".")[0].replace(",", "").split(" ")
    return _negative_else_yes(not {"No", "not", "no"}.isdisjoint(tokens), text)


def code(text: str, label: str) -> Verdict:
    """CODE (arXiv 2406.01920): POPE's rule on lower-cased text."""
    return pope_official(text.lower(), label)


def opera(text: str, label: str) -> Verdict:
    """OPERA, PAI, HALC: whole answer; a token No, not, no, NO or one ending in n't means no; anything else yes."""
    tokens = text.replace(".", "").replace(",", "").split(" ")
    return _negative_else_yes(any(t in {"No", "not", "no", "NO"} or t.endswith("n't") for t in tokens), text)


def vcd(text: str, label: str) -> Verdict:
    """VCD, DAMRO, DeCo, LLaVA-Align: right if the lower-cased text contains the label, so the verdict depends on it.

    "know" contains "no"; an answer with both is right for either label, one with neither is wrong for either. Both
    kinds are unclear.
    """
    text = text.lower()
    right = label in text
    verdict = label if right else {"yes": "no", "no": "yes"}[label]
    return verdict, ("yes" in text) != ("no" in text)


def lmms_eval(text: str, label: str) -> Verdict:
    """lmms-eval: the stripped, lower-cased answer must be exactly yes or no; "Yes." is neither."""
    word = text.lower().strip()
    return (word, True) if word in {"yes", "no"} else ("other", False)


def vlmevalkit(text: str, label: str) -> Verdict:
    """VLMEvalKit: punctuation removed, exactly one of the whole words yes and no; otherwise unknown."""
    words = _without_punctuation(text).split()
    if ("yes" in words) == ("no" in words):
        return "other", False
    return ("yes" if "yes" in words else "no"), True


def icd(text: str, label: str) -> Verdict:
    """ICD (arXiv 2403.18715): POPE's sentence and negatives; then a token Yes or yes; otherwise the answer is
    dropped.
    """
    tokens = text.split(".")[0].replace(",", "").split(" ")
    if not {"No", "not", "no"}.isdisjoint(tokens):
        return "no", True
    return ("yes", True) if not {"Yes", "yes"}.isdisjoint(tokens) else ("other", False)


def contains(text: str, label: str) -> Verdict:
    """RePOPE, DASH-B, BEAF: yes if the lower-cased answer contains "yes", else no if it contains "no" ("know" does)."""
    text = text.lower()
    return ("yes", True) if "yes" in text else ("no", True) if "no" in text else ("other", False)


def strict(text: str, label: str) -> Verdict:
    """The first word, any case and punctuation, must be yes or no; otherwise the answer is unparsed."""
    first = re.match(r"\W*(yes|no)\b", text.lower())
    return (first[1], True) if first else ("other", False)


def mme(text: str, label: str) -> Verdict:
    """MME's own script: a whole answer yes or no, else the first four characters contain yes, or else no."""
    head = text.lower()[:4]
    verdict = "yes" if "yes" in head else "no" if "no" in head else "other"
    return verdict, verdict != "other"


def lmms_eval_mme(text: str, label: str) -> Verdict:
    """lmms-eval's MME: as MME's, on stripped text without full stops; a bare y or n counts."""
    text = text.lower().strip().replace(".", "")
    return ({"y": "yes", "n": "no"}[text], True) if text in {"y", "n"} else mme(text, label)


def _without_punctuation(text: str) -> str:
    """VQA's punctuation step, in effect: a listed mark that touches a blank anywhere is deleted, else it becomes a
    blank.

    Asterisks and colons are not listed, so "**Yes**" stays one token and is unknown.
    """
    text = text.lower()
    cleaned = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        cleaned = cleaned.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)


RULES: dict[str, Callable[[str, str], Verdict]] = {
    "pope-official": pope_official,
    "opera": opera,
    "vcd": vcd,
    "lmms-eval": lmms_eval,
    "vlmevalkit": vlmevalkit,
    "icd": icd,
    "code": code,
    "repope": contains,
    "strict": strict,
    "mme": mme,
    "lmms-eval-mme": lmms_eval_mme,
}


def rule(name: str) -> Callable[[str, str], Verdict]:
    """A parsing rule by name."""
    if name not in RULES:
        raise UnknownNameError.of("parsing rule", name, RULES)
    return RULES[name]


def row_of(answer: Answer, label: str, reader: str, **evidence: Any) -> Row:
    """The row of a question whose gold answer is `label`, yes or no. reader: the name of a rule. evidence: besides the text."""
    said, clear = rule(reader)(answer.answer, label)
    return Row.of(
        replace(answer, label=label),
        parsed=said,
        correct=said == label,
        rule=reader,
        clear=clear,
        **evidence,
        text=answer.text,
    )
