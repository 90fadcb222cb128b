"""What a request may say. A field that is not here is refused by its name; one that could ask for more than is done
here may only say that it does not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import Refused, wrong

Stop = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
Neutral = Field(None, description="accepted only where it asks for nothing")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class Body(BaseModel):
    """What both kinds of requests may say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = Neutral
    frequency_penalty: Zero | None = Neutral
    presence_penalty: Zero | None = Neutral
    logprobs: Literal[False] | None = Neutral

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Body):
    prompt: str | Annotated[list[int], Field(min_length=1)]
    best_of: Literal[1] | None = Neutral
    echo: Literal[False] | None = Neutral


class Chat(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: TextFormat | None = Neutral


def refusal(problems: list[Any]) -> Refused:
    """Of what pydantic found, one field, as OpenAI says it: what is not supported comes first."""
    order = {"extra_forbidden": 0, "literal_error": 1}
    problem = min(problems, key=lambda one: order.get(one["type"], 2))
    path = [str(part) for part in problem["loc"] if part != "body"]
    param, kind = path[0] if path else None, problem["type"]
    where = ".".join(part for part in path if part not in ("str", "constrained-str") and "[" not in part) or "the body"
    if kind == "extra_forbidden":
        return wrong(param, f"{where} is not supported by this server", "unsupported_parameter")
    if kind == "json_invalid":
        return Refused(400, "the body is no JSON", code="invalid_json")
    if kind == "missing":
        return wrong(param, f"{where} is missing", "missing_required_parameter")
    ways = [one["msg"] for one in problems if one["loc"][:2] == problem["loc"][:2]]  # a text, or a list of them, say
    told = [problem["msg"]] if kind == "literal_error" else dict.fromkeys(ways)
    return wrong(param, f"{where}: {'; or: '.join(told)}", "invalid_value")
