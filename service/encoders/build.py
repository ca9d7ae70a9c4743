"""From a configuration to an encoder's engine that is ready to start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.encoders.config import EncoderConfig
from models.encoders.loader import load
from models.errors import CheckpointError
from models.tokenizer import Tokenizer
from service.encoders.engine import EncoderEngine, Limits
from service.engine.build import device_name
from service.errors import ConfigError
from service.metrics import Metrics

if TYPE_CHECKING:
    from service.config import ServiceConfig


def check_encoder(config: ServiceConfig) -> int:
    """Everything that can be known to be wrong before the weights are read.

    Returns:
        The length limit to serve with, tokens.

    Raises:
        ConfigError: the numbers contradict each other.
        ModelError: the checkpoint's config.json cannot be served.
    """
    model = EncoderConfig.from_folder(config.model, config.encoder.random_attention)
    wanted = config.max_model_len or model.max_model_len
    if wanted > model.max_model_len:
        raise ConfigError(
            f"invalid configuration: max_model_len {wanted} is more than the "
            f"{model.max_model_len} tokens that the checkpoint takes; lower it"
        )
    return wanted


def build_encoder(config: ServiceConfig) -> EncoderEngine:
    """Load the encoder; the caller starts the engine.

    Raises:
        ConfigError: the numbers contradict each other.
        ModelError: the checkpoint cannot be loaded.
    """
    max_model_len = check_encoder(config)
    device = torch.device(device_name(config.device))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the thread's current one
    encoder = load(
        config.model, config.dtype, device, config.load_format, config.encoder.random_attention
    )
    tokenizer = Tokenizer.from_folder(config.model)
    model = encoder.config
    if (
        model.head == "question_answering"
        and model.sep_id not in tokenizer.encode_pair("a", "b").ids
    ):
        raise CheckpointError(
            f"{config.model}: tokenizer.json joins a question and its context without the "
            f"sep_token_id {model.sep_id} of config.json; save the tokenizer that the model was "
            "trained with."
        )
    metrics = Metrics(config.model_name)
    metrics.attention_backend(encoder.impl)
    return EncoderEngine(
        encoder,
        tokenizer,
        metrics,
        limits=Limits(config.max_step_tokens, config.max_num_seqs, config.max_queue),
        model_name=config.model_name,
        max_model_len=max_model_len,
    )
