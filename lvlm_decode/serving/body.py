"""A chat request as it comes over the wire: every field is known, and has a meaning here or asks for nothing."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import suggestion
from .refusals import Refused

#: Fields of OpenAI's API that are taken with these values only -> why with no other.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer is given to a request; send it several times, with another seed each"),
    "logprobs": ((False,), "the scores of a method that contrasts views are no log-probabilities of the model"),
    "top_logprobs": ((0,), "the scores of a method that contrasts views are no log-probabilities of the model"),
    "presence_penalty": ((0,), "tokens are not penalised here"),
    "frequency_penalty": ((0,), "tokens are not penalised here"),
    "logit_bias": (({},), "scores are changed by the method alone"),
    "response_format": (({"type": "text"},), "answers are free text"),
    "tools": (([],), "no tools are called"),
    "tool_choice": (("none", "auto"), "no tools are called"),
    "parallel_tool_calls": ((True, False), "no tools are called"),
    "functions": (([],), "no functions are called"),
    "function_call": (("none", "auto"), "no functions are called"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "no predicted answer is used"),
    "reasoning_effort": ((), "the model answers without reasoning first"),
    "verbosity": ((), "the length of answers is bounded by max_tokens alone"),
    "web_search_options": ((), "nothing is searched for"),
    "service_tier": (("auto", "default"), "all requests wait in one queue"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
}
MOST_TURNS, MOST_PARTS = 64, 64


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Url(_Closed):
    url: str
    detail: Literal["auto"] | None = None


class _TextPart(_Closed):
    type: Literal["text"]
    text: str


class _ImagePart(_Closed):
    type: Literal["image_url"]
    image_url: _Url


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Turn(_Closed):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(min_length=1, max_length=MOST_PARTS)]


class _StreamOptions(_Closed):
    include_usage: bool = False


class Body(BaseModel):
    """The fields of a request that mean something here; what is in none of them is a parameter of the method."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: Annotated[list[_Turn], Field(min_length=1, max_length=MOST_TURNS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    sample_id: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None
    method: Annotated[str, Field(min_length=1, max_length=512)] | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What may be parameters of the method."""
        return dict(self.model_extra or {})

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def length(self) -> int | None:
        """The most tokens that the request asks for."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise Refused(
                400, "max_tokens and max_completion_tokens are two names of one limit; give one.", "max_tokens"
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


#: What a chat request may say.
FIELDS = (*Body.model_fields, *NEUTRAL)


def read_body(raw: bytes) -> Body:
    """The request in the body of a POST.

    Raises:
        Refused: no JSON object, a field of another type or out of its range, a field that asks for what is not done here.
    """
    try:
        given = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON ({error}).") from error
    if not isinstance(given, dict):
        raise Refused(400, f"the body is a JSON {type(given).__name__}; expected an object with model and messages.")
    # Clients write null for what they leave out.
    given = {name: value for name, value in given.items() if value is not None}
    for name in NEUTRAL.keys() & given.keys():
        allowed, why = NEUTRAL[name]
        value = given.pop(name)
        if not any(type(value) is type(one) and value == one for one in (*allowed, *_as_floats(allowed))):
            raise Refused(400, f"{name} is refused: {why}; leave it out.", name, "unsupported_parameter")
    try:
        return Body.model_validate(given)
    except ValidationError as error:
        raise _told(error) from error


def _as_floats(values: tuple[Any, ...]) -> tuple[float, ...]:
    return tuple(float(value) for value in values if type(value) is int)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def _told(error: ValidationError) -> Refused:
    """The first thing that is wrong, in one sentence."""
    # Of a union every branch complains; meant is the one that got furthest, and had the right type.
    first = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    steps = [str(step) for step in first["loc"] if not (isinstance(step, str) and ("[" in step or step == "str"))]
    # The kind of a part stands before its fields, one of which has the same name.
    place = [step for step, before in zip(steps, ["", *steps]) if step != before]
    field = ".".join(place) or "the body"
    if first["type"] == "missing":
        return Refused(400, f"{field} is missing; a request needs it.", field, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"{field} is unknown; leave it out.", field, "unknown_parameter")
    value = "" if isinstance(first["input"], dict | list) else f" (got {first['input']!r:.80})"
    hint = suggestion(first["input"], ("system", "user", "assistant")) if place[-1:] == ["role"] else ""
    said = first["msg"][:1].lower() + first["msg"][1:]
    return Refused(400, f"{field}: {said}{value}{hint}.", field, "invalid_value")
