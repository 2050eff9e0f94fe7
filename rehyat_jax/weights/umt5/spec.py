"""Spec of the umT5 text encoder for reading and writing its weights."""

from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.models.umt5.config import UMT5Config
from rehyat_jax.models.umt5.modeling import UMT5Encoder
from rehyat_jax.weights.spec import Inferred, ModelSpec, ShapeOf, UpstreamConfig
from rehyat_jax.weights.table import Layout
from rehyat_jax.weights.umt5.names import umt5_table

UPSTREAM: dict[Layout, UpstreamConfig] = {
    "diffusers": UpstreamConfig(
        fields={
            "d_ff": "ffn_dim",
            "d_kv": "head_dim",
            "d_model": "model_dim",
            "layer_norm_epsilon": "eps",
            "num_heads": "num_heads",
            "num_layers": "num_layers",
            "relative_attention_max_distance": "max_distance",
            "relative_attention_num_buckets": "num_buckets",
            "vocab_size": "vocab_size",
        },
        fixed={
            "dense_act_fn": "gelu_new",
            "feed_forward_proj": "gated-gelu",
            "is_gated_act": True,
            "model_type": "umt5",
        },
        marker="model_type",
        written={
            "architectures": ["UMT5EncoderModel"],
            "classifier_dropout": 0.0,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "tokenizer_class": "T5Tokenizer",
            "use_cache": True,
        },
        is_open=True,
    ),
}
"""The values are those of google/umt5-xxl. Each version of transformers adds fields. The original code has no file: its
sizes are in its source.
"""


def _infer(shape: ShapeOf, source: Any) -> dict[str, Inferred]:
    """The fields of `UMT5Config`, and "width", that the tensors' shapes imply. Raises InputError."""
    (vocab_size, model_dim), embedding_name = shape("token_embedding")
    (_, width), query_name = shape("blocks.attention.query.kernel")
    (num_buckets, num_heads), bias_name = shape("blocks.attention.relative_bias")
    (_, ffn_dim), ffn_name = shape("blocks.feed_forward.up.kernel")
    if not num_heads or width % num_heads:
        raise InputError(
            f"{source}: tensor {query_name} should have a multiple of the {num_heads} heads of {bias_name} as its "
            f"rows, found {width}; the tensors belong to different checkpoints"
        )
    return {
        "width": Inferred(width, query_name),
        "vocab_size": Inferred(vocab_size, embedding_name),
        "model_dim": Inferred(model_dim, embedding_name),
        "num_heads": Inferred(num_heads, bias_name),
        "head_dim": Inferred(width // num_heads, query_name),
        "num_buckets": Inferred(num_buckets, bias_name),
        "ffn_dim": Inferred(ffn_dim, ffn_name),
    }


UMT5 = ModelSpec(
    architecture="umt5",
    description="the umT5 text encoder",
    part="text_encoder",
    config=UMT5Config,
    model=UMT5Encoder,
    table=umt5_table,
    upstream=UPSTREAM,
    metadata={},
    smallest=UMT5Config(vocab_size=1, model_dim=1, num_heads=1, head_dim=1, ffn_dim=1, num_layers=1),
    infer=_infer,
    foreign={("decoder.block.", "lm_head."): "a umT5 with a decoder"},
    is_transformer=True,
    unsupported="another activation",
    head_dim=64,
    defaulted=("eps", "max_distance"),
    copies={"encoder.embed_tokens.weight": "shared.weight"},
    file_name="model",
    original_file="models_t5_*",
)
