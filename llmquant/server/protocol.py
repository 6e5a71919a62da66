"""What clients may ask, as the OpenAI interface spells it; and how a refusal looks.

A field that is not served is refused, not ignored: an answer that leaves out what was asked for looks like a right one.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Stop = Annotated[str, Field(min_length=1, max_length=64)]


class Refusal(Exception):
    """An answer that is an error, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if wait is None else {"Retry-After": str(wait)}

    def to_dict(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


class Request(_Strict):
    """What chats and completions have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)  # as vLLM has it; 0: all
    repetition_penalty: float | None = Field(None, gt=0, le=2)  # as vLLM has it
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: Stop | Annotated[tuple[Stop, ...], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | tuple[TextPart, ...]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Request):
    """POST /v1/chat/completions."""

    USUAL: ClassVar[int | None] = None  # new tokens where none are asked for; None: as many as there is room for
    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Completion(Request):
    """POST /v1/completions."""

    USUAL: ClassVar[int | None] = 16
    prompt: str | tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def most(self) -> int | None:
        return self.max_tokens


Asked = TypeVar("Asked", Chat, Completion)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """The request in a body.

    Raises:
        Refusal: it is not JSON, or not a request of that kind.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"][:1])
        told = "this field is not served here" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refusal(400, f"{field}: {told}" if field else told, param=field or None) from error
