"""What a request may say. The types are the rule, so the server's own OpenAPI states it too:

- A field that this server honours has its full type.
- A field that would change the answer and is not supported admits only the value that changes nothing.
- A field that cannot change the answer is taken and listed in the response's header `x-ignored-fields`.
- Any other field is refused. Null is the same as not said.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from stages.corpus.rows import Message
from stages.inference.settings import MAX_LOGPROBS, SEEDS, Sampling

_IGNORED = "x-ignored"

Nothing = Annotated[list[Any], Field(max_length=0)]
NoMap = Annotated[dict[str, Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
Ignored = Annotated[
    Any,
    Field(description="Taken and ignored; the header x-ignored-fields says so.", json_schema_extra={_IGNORED: True}),
]


def _unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair; no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]
Many = Field(min_length=1, fail_fast=True)
"""Of a list that may be as long as a body: its first wrong item is told, not one error for each of a million."""
Ids = Annotated[list[int], Many]

COMPLETION_TOKENS = 16
"""What OpenAI's completions write unless told otherwise."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field_says_enough(cls, said: Any) -> Any:
        """As of a list's items, the first is told."""
        if isinstance(said, dict) and len(said) > len(cls.model_fields):
            unknown = next(name for name in said if name not in cls.model_fields)
            return {name: value for name, value in said.items() if name in cls.model_fields or name == unknown}
        return said


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Common(Strict):
    """What both kinds of request have in common."""

    prompt_field: ClassVar[str]
    """The field that says what is to be answered."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; absent, it is 1.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = Field(None, description="Absent, it is drawn by chance.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: NoMap | None = None

    user: Ignored = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` means something only with `stream`")
        return self

    @property
    def length_field(self) -> str:
        """The field that says how long an answer may get."""
        return "max_tokens"

    def ignored(self) -> list[str]:
        """Fields that were said and change nothing."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        return sorted(
            name
            for name in self.model_fields_set
            if extras[name] == {_IGNORED: True} and getattr(self, name) is not None
        )

    def _sampling(self, max_new_tokens: int, logprobs: int | None) -> Sampling:
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
        )


class CompletionRequest(Common):
    """POST /v1/completions. A text is one user message under the chat template, as in `generate`; ids stay ids."""

    prompt_field = "prompt"
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=64)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="Only the value of n.")
    echo: Literal[False] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _every_answer_is_returned(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("`best_of` other than `n` is not supported")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One or more, each a text or its ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [prompt for prompt in self.prompt if isinstance(prompt, str)]
        ids = [prompt for prompt in self.prompt if isinstance(prompt, int)]
        several = [prompt for prompt in self.prompt if isinstance(prompt, list)]
        return [*texts, *([ids] if ids else []), *several]  # one of the three, by the type

    def sampling(self, longest: int) -> Sampling:
        """`longest` is the most tokens that an answer may have here."""
        return self._sampling(
            min(COMPLETION_TOKENS, longest) if self.max_tokens is None else self.max_tokens, self.logprobs
        )


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ChatTurn(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Many]

    name: None = None
    refusal: None = None
    audio: None = None
    annotations: Nothing | None = None
    function_call: None = None
    tool_calls: Nothing | None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    prompt_field = "messages"
    messages: Annotated[list[ChatTurn], Many]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    audio: None = None
    moderation: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @model_validator(mode="after")
    def _alternatives_belong_to_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` means something only with `logprobs`")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("`max_tokens` and `max_completion_tokens` are the same and differ")
        return self

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def prompts(self) -> list[tuple[Message, ...]]:
        """The one conversation."""
        return [tuple(turn.message() for turn in self.messages)]

    def sampling(self, longest: int) -> Sampling:
        """`longest` is the most tokens that an answer may have here."""
        asked = self.max_completion_tokens or self.max_tokens
        return self._sampling(asked or longest, (self.top_logprobs or 0) if self.logprobs else None)
