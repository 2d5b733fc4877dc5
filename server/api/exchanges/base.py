"""One request that was read: what to run, and how the reply is to be written."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from server.api.answer import Answer
from server.api.convert import Prepared
from server.api.serving import Loaded, Serving
from server.api.shapes.base import Shape
from server.errors import ContextOverflow, RequestError


@dataclass(frozen=True, slots=True)
class Exchange:
    """The same for every protocol, from here on."""

    prepared: Sequence[Prepared]  # run one after another
    shape: Shape
    stream: bool
    prompt_field: str = "messages"  # where the prompt stands in the client's body, for the error of one that is too long

    def submit(self, loaded: Loaded, timeout_s: float | None = None) -> Answer:
        """Its answer, to be closed whatever happens. Raises what Service.submit raises."""
        try:
            return Answer(loaded, self.prepared, timeout_s)
        except ContextOverflow as error:
            error.param = self.prompt_field
            raise


Reader = Callable[[bytes, Serving, Loaded], Exchange]  # raises RequestError


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Name fields as the client does: `names` are those of OpenAI's chats, each with the one that it was translated from."""
    try:
        yield
    except RequestError as error:
        message, param = str(error), error.param
        for ours, theirs in names.items():
            message = message.replace(f"'{ours}", f"'{theirs}")
            param = theirs + param.removeprefix(ours) if param is not None and param.startswith(ours) else param
        raise RequestError(message, param=param, code=error.code) from error


def new_id(kind: str) -> str:
    """An id that no other reply has, beginning with its kind."""
    return f"{kind}{uuid.uuid4().hex}"
