"""Bodies of requests. Unknown fields, wrong types and values out of bounds are refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints, model_validator

MOST_MESSAGES = 1 << 14  # a page sends its whole conversation; what is too much text is refused by its bytes
LONGEST_MESSAGE = 400_000  # characters
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """A part of a message in the list form of its content; text is the only kind."""

    type: Literal["text"]
    text: Annotated[str, StringConstraints(max_length=LONGEST_MESSAGE)]


class ChatMessage(_Strict):
    """One turn. `developer` means `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, StringConstraints(max_length=LONGEST_MESSAGE)] | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: Annotated[str, StringConstraints(max_length=64)] | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class SynapseOptions(_Strict):
    """The extension `x_synapse`.

    memory: name of the memory that a conversation starts with and leaves its fast weights in; conversation: its id, so that
    further turns start where its first one did; vitals_every: tokens between two looks at the synapses; samples: random releases
    behind each token; overflow: what happens when the messages do not fit.
    """

    memory: Name | None = None
    conversation: Name | None = None
    vitals_every: Annotated[StrictInt, Field(ge=0, le=4096)] = 0
    samples: Annotated[StrictInt, Field(ge=0, le=16)] = 0
    overflow: Literal["error", "drop_oldest"] = "error"
    tools: StrictBool = True
    return_tokens: StrictBool = False


class StreamOptions(_Strict):
    """include_usage: a last chunk with the counts of tokens."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    model: Annotated[str, StringConstraints(max_length=200)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Real, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1 << 20)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 62)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=200)] | None = None
    x_synapse: SynapseOptions = Field(default_factory=SynapseOptions)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.x_synapse.samples == 1:
            raise ValueError("x_synapse.samples=1 says nothing about uncertainty: 0 or at least 2")
        if self.x_synapse.conversation and not self.x_synapse.memory:
            raise ValueError("x_synapse.conversation needs x_synapse.memory")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
