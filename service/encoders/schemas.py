"""What clients may send to an encoder's routes.

`/v1/embeddings` takes OpenAI's body, `/classify` vLLM's, and `/fill-mask` and `/question-answering`
take those of Hugging Face's pipelines over HTTP: `inputs` and `parameters`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from service.api.schemas import Body, Prompt, one_or_many

Places = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=4096)]
"""Longformer's global tokens, by their place among a text's tokens."""


class InputRequest(Body):
    """What embeddings and classification share."""

    model: str | None = None
    input: list[Prompt]
    global_tokens: Places | None = None

    @field_validator("input", mode="plain")
    @classmethod
    def _input_is_one_or_many(cls, given: Any, info: ValidationInfo) -> list[Prompt]:
        texts = one_or_many(given, info)
        if not all(texts):
            raise ValueError("no text may be empty")
        return texts


class EmbeddingRequest(InputRequest):
    """Body of POST /v1/embeddings."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


class ClassifyRequest(InputRequest):
    """Body of POST /classify."""


class FillParameters(Body):
    """`parameters` of /fill-mask."""

    top_k: int = Field(default=5, ge=1, le=1000)
    targets: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None


class FillRequest(Body):
    """Body of POST /fill-mask."""

    model: str | None = None
    inputs: list[str]
    parameters: FillParameters = FillParameters()
    global_tokens: Places | None = None
    several: bool = False  # whether `inputs` was a list

    @model_validator(mode="before")
    @classmethod
    def _inputs_are_one_or_many(cls, body: Any) -> Any:
        if isinstance(body, dict) and isinstance(body.get("inputs"), str):
            return {**body, "inputs": [body["inputs"]], "several": False}
        return {**body, "several": True} if isinstance(body, dict) else body

    @field_validator("inputs")
    @classmethod
    def _inputs_are_texts(cls, inputs: list[str], info: ValidationInfo) -> list[str]:
        one_or_many(inputs, info)
        return inputs


class QuestionInputs(Body):
    """`inputs` of /question-answering."""

    question: str = Field(min_length=1)
    context: str = Field(min_length=1)


class QuestionParameters(Body):
    """`parameters` of /question-answering."""

    top_k: int = Field(default=1, ge=1, le=1000)
    max_answer_len: int = Field(default=15, ge=1, le=1000)
    handle_impossible_answer: bool = False


class QuestionRequest(Body):
    """Body of POST /question-answering; question and context may also stand beside `inputs`."""

    model: str | None = None
    inputs: QuestionInputs
    parameters: QuestionParameters = QuestionParameters()

    @model_validator(mode="before")
    @classmethod
    def _inputs_may_stand_outside(cls, body: Any) -> Any:
        if isinstance(body, dict) and "inputs" not in body and "question" in body:
            inputs = {name: body[name] for name in ("question", "context") if name in body}
            return {**body, "inputs": inputs}
        return body
