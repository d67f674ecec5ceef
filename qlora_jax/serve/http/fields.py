"""What a request may hold. Types are strict: "0.5" is no number and true is no 1."""

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlora_jax.generation.sampling import Sampling
from qlora_jax.serve.http import limits
from qlora_jax.serve.http.errors import ApiError

# Fields of OpenAI's that change nothing here.
IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "prediction",
}
# Fields that would change the answer if they were heeded: only the values that change nothing are taken.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Lists end at their first wrong member (fail_fast): an error for each of a million would take seconds.
# tool_choice decides what the template sees, so chats keep it.
KEPT = {"tool_choice"}

Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Name = Annotated[str, Field(min_length=1, max_length=limits.NAME_CHARACTERS)]


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Generation(BaseModel):
    """What both kinds of requests have in common. null is as good as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Name = Field(description="the base or an adapter, by the names that /v1/models lists")
    n: int | None = Field(None, ge=1, le=limits.CHOICES)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 where it is left out")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=1 << 31, description="draw from the k best tokens; 0 is all")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, description="left out: another one for each request")
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, body: Any) -> Any:
        """Takes out fields of OpenAI's that change nothing; refuses values that would."""
        if not isinstance(body, dict):
            return body
        if len(body) > limits.FIELDS:
            raise ApiError(400, f"the body has {len(body):,} fields, a request has at most {limits.FIELDS}")
        for name, harmless in UNSUPPORTED.items():
            if name in body and not any(body[name] == value for value in harmless):
                raise ApiError(
                    400,
                    f"{name}={reprlib.repr(body[name])} is not supported: leave the field out",
                    param=name,
                    code="unsupported_parameter",
                )
        dropped = IGNORED | UNSUPPORTED.keys() - KEPT
        return {name: value for name, value in body.items() if name not in dropped}

    @model_validator(mode="after")
    def _check(self) -> "Generation":
        if self.temperature and self.temperature < limits.COLDEST:
            raise ApiError(
                400,
                f"temperature must be 0 (greedy) or at least {limits.COLDEST}, got {self.temperature}",
                param="temperature",
            )
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        return self

    @property
    def sampling(self) -> Sampling:
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature=temperature, top_k=self.top_k or 0, top_p=self.top_p or 1.0)

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionFields(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=limits.PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=limits.PROMPTS, fail_fast=True)]
    ) = Field(description="a text, texts, token ids or lists of token ids")
    max_tokens: int | None = Field(None, ge=0, lt=1 << 31, description="16 where it is left out; 0 only echoes")
    logprobs: int | None = Field(None, ge=0, le=limits.LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionFields":
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of={self.best_of} is not supported: leave it out, or give n", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens=0 needs echo=true: nothing would be answered", param="max_tokens")
        return self


class Part(BaseModel):
    """Text within a message."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of the chat; the template may read further keys."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content (or tool_calls)")
        if len(self.model_extra or {}) > limits.FIELDS:
            raise ValueError(f"a message has at most {limits.FIELDS} other fields")
        return self


class ChatFields(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=limits.MESSAGES)
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31, description="what fits, where it is left out")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=limits.LOGPROBS)
    tools: Annotated[list[dict[str, Any]], Field(max_length=limits.TOOLS, fail_fast=True)] | None = Field(
        None, description="handed to the template; the answer is not parsed for calls"
    )
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=limits.FIELDS)] | None = Field(
        None, description="further variables for the template, such as enable_thinking"
    )

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatFields":
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The newer name counts where both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class LoadAdapterFields(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Name
    lora_path: Name | None = Field(None, description="a folder's name inside the adapters folder; else lora_name")


class UnloadAdapterFields(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Name
