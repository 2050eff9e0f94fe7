"""Names of umT5's parameters: in this package, transformers' `UMT5EncoderModel` and Wan's original `T5Encoder`."""

from rehyat_jax.models.umt5.config import UMT5Config
from rehyat_jax.weights.table import ENCODER_BLOCK, LINEAR, Row, in_blocks


def umt5_table(config: UMT5Config) -> list[Row]:
    """The rows of an encoder, in the order of transformers' state dict."""
    width, inner, hidden = config.model_dim, config.width, config.ffn_dim
    theirs, dense = "layer.0.SelfAttention.", "layer.1.DenseReluDense."
    block = [
        _linear("attention.query", theirs + "q", "attn.q", width, inner),
        _linear("attention.key", theirs + "k", "attn.k", width, inner),
        _linear("attention.value", theirs + "v", "attn.v", width, inner),
        _linear("attention.output", theirs + "o", "attn.o", inner, width),
        Row(
            "attention.relative_bias",
            (config.num_buckets, config.num_heads),
            theirs + "relative_attention_bias.weight",
            "pos_embedding.embedding.weight",
        ),
        Row("attention_norm.scale", (width,), "layer.0.layer_norm.weight", "norm1.weight"),
        _linear("feed_forward.gate", dense + "wi_0", "ffn.gate.0", width, hidden),
        _linear("feed_forward.up", dense + "wi_1", "ffn.fc1", width, hidden),
        _linear("feed_forward.down", dense + "wo", "ffn.fc2", hidden, width),
        Row("feed_forward_norm.scale", (width,), "layer.1.layer_norm.weight", "norm2.weight"),
    ]
    return [
        Row("token_embedding", (config.vocab_size, width), "shared.weight", "token_embedding.weight"),
        *(in_blocks(row, "blocks.", tuple(range(config.num_layers)), diffusers=ENCODER_BLOCK) for row in block),
        Row("final_norm.scale", (width,), "encoder.final_layer_norm.weight", "norm.weight"),
    ]


def _linear(path: str, diffusers: str, original: str, in_features: int, out_features: int) -> Row:
    return Row(f"{path}.kernel", (in_features, out_features), f"{diffusers}.weight", f"{original}.weight", LINEAR)
