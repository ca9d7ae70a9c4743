"""`saccade generate`: one answer in the terminal, without a server."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from tqdm import tqdm

from service.api.chat import chat_tokens
from service.api.errors import from_validation
from service.api.reports import report_json
from service.api.sampling import sparsity_params
from service.api.schemas import Message, SparsityRequest
from service.config import load_config
from service.engine.build import build_engine
from service.engine.types import SamplingParams
from service.errors import GenerationError

if TYPE_CHECKING:
    from service.engine.engine import Engine
    from service.engine.types import SparsityParams

REQUEST_ID = "generate"


def generate(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; the bundled one by default.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Text to continue; - reads it from standard input.")
    ] = "-",
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file.")] = None,
    policy: Annotated[str | None, typer.Option(help="dynamic, fixed or dense.")] = None,
    coverage: Annotated[float | None, typer.Option(help="Attention mass to keep.")] = None,
    max_keys: Annotated[int | None, typer.Option(help="Most keys a query.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Keys of the fixed policy.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Continue a prompt and say where the attention looked."""
    flags = {"model": model, "dtype": dtype, "device": device}
    settings = load_config({name: value for name, value in flags.items() if value}, config)
    try:
        asked = SparsityRequest.model_validate(
            {"policy": policy, "coverage": coverage, "max_keys": max_keys, "pattern": pattern}
        )
    except ValidationError as error:
        raise from_validation(error) from None
    sparsity = sparsity_params(asked, settings.sparsity)
    text = sys.stdin.read() if prompt == "-" else prompt
    engine = build_engine(settings)
    if chat:
        tokens = chat_tokens([Message(role="user", content=text)], engine.tokenizer)
    else:
        tokens = engine.tokenizer.encode(text)
    sampling = SamplingParams(
        max_tokens=min(max_tokens, max(1, engine.max_model_len - len(tokens))),
        temperature=temperature,
        seed=seed,
    )
    engine.start()
    try:
        asyncio.run(_print(engine, tokens, sampling, sparsity))
    finally:
        engine.stop()


async def _print(
    engine: Engine, prompt: list[int], sampling: SamplingParams, sparsity: SparsityParams
) -> None:
    stream = engine.submit(prompt, sampling, sparsity, request_id=REQUEST_ID)
    progress = asyncio.create_task(_show_prefill(engine, len(prompt)))
    try:
        async for delta in stream:
            if not progress.done():
                progress.cancel()
                await asyncio.wait([progress])
            if delta.error is not None:
                raise GenerationError(delta.error)
            print(delta.text, end="", flush=True)
            if delta.sparsity is not None:
                print()
                print(json.dumps(report_json(delta.sparsity)), file=sys.stderr)
    finally:
        progress.cancel()
        stream.close()


async def _show_prefill(engine: Engine, tokens: int) -> None:
    """A bar of the prompt's tokens, from half a second on, until cancelled."""
    with tqdm(total=tokens, desc="Prompt", unit="token", delay=0.5, leave=False) as bar:
        while True:
            await asyncio.sleep(0.1)
            bar.update(engine.prefilled(REQUEST_ID) - bar.n)
