"""Bodies of requests, read and checked in bounded time; what is wrong first has a message.

In a thread, not in the loop that serves all connections.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from petl.errors import printable, shown
from petl.generation.serving.replies import ApiError
from petl.generation.serving.wire import Strict

# by path: the class of bodies, and what replies to one
Paths = Mapping[str, tuple[type[Strict], Callable[[Any, Request], Awaitable[Response]]]]
Body = TypeVar("Body", bound=Strict)
MAX_FIELDS = 1024  # of one JSON object: each unknown one is an error
SHOULD_BE = "Input should be "  # how pydantic's messages begin
OBJECT = f"{SHOULD_BE}an object"
NO_OBJECT = "the body is not a JSON object, sent with Content-Type: application/json"


def read_body(kind: type[Body], raw: bytes, content_type: str) -> Body:
    """Return the body of a request.

    Raises:
        ApiError: it is no JSON, or a field is wrong; the message has its name and value.
    """
    # a web page may send other types to any address without being asked
    media = content_type.partition(";")[0].strip().lower()
    if media != "application/json" and not (media[:12] == "application/" and media[-5:] == "+json"):
        raise ApiError(NO_OBJECT)
    try:
        content = json.loads(raw, object_pairs_hook=_bounded)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON ({error or 'it is nested too deep'})") from error
    if not isinstance(content, dict):
        raise ApiError(NO_OBJECT)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        message, param = explained(error)
    raise ApiError(message, param=printable(param) or None)


def _bounded(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MAX_FIELDS:
        message = f"an object of the body has {len(pairs):,} fields; allowed are {MAX_FIELDS:,}"
        raise ApiError(message)
    return dict(pairs)


def explained(error: ValidationError) -> tuple[str, str]:
    """Return the message of the error that is nearest to what was meant, and its field.

    Each type of a union has an error of its own: meant is the type that fits furthest.
    """
    every = error.errors(include_url=False, include_context=False)
    errors = [each for each in every if each["loc"][:1] == every[0]["loc"][:1]]
    places = [_place(each["loc"]) for each in errors]
    furthest = max(places, key=lambda place: (len(place), _items(place)))
    there = [each for each, place in zip(errors, places, strict=True) if place == furthest]
    # a value of the right type that is out of bounds says more than that it has no other type
    meant = [each for each in there if not each["type"].endswith("_type")] or there
    first, param = meant[0], ".".join(map(str, furthest))
    value = f"{param}={shown(first['input'])}"
    if first["type"] == "missing":
        return f"{param} is missing", param
    if first["type"] == "extra_forbidden":
        return f"{value}: this server has no such setting", param
    # pydantic's message about an object names the class
    expected = [OBJECT if each["type"] == "model_type" else each["msg"] for each in meant]
    expected = list(dict.fromkeys(expected))
    if len(expected) > 1 and all(each.startswith(SHOULD_BE) for each in expected):
        expected = [SHOULD_BE + " or ".join(each.removeprefix(SHOULD_BE) for each in expected)]
    message = f"{value}: {expected[0]}" if param else expected[0]
    return message.replace("Value error, ", ""), param


def _place(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """The place of an error without names of types, such as constrained-str."""
    inside = (part for part in loc[1:] if isinstance(part, int) or part.isidentifier())
    return (*loc[:1], *inside)


def _items(place: Sequence[int | str]) -> list[int]:
    return [part for part in place if isinstance(part, int)]
