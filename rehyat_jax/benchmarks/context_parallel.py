"""Communication of a time-sharded layer: python -m rehyat_jax.benchmarks.context_parallel [--frames 21 81 321].

The program is the forward and backward pass of one layer of Wan2.1 1.3B at 480p, hybrid or with `--softmax` full
softmax. It is sharded over the 8 devices of a TPU v5e:2x4 and compiled without a TPU. The table has the bytes that one
device sends, by kind (`cost_model.collectives`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from rehyat_jax.attention import FeatureMap, FeatureMapConfig
from rehyat_jax.attention.hybrid.context_parallel import padded_frames
from rehyat_jax.attention.on_mesh import CONTEXT, hybrid_attention_on_mesh, softmax_attention_on_mesh
from rehyat_jax.cli import CommandParser
from rehyat_jax.cost_model.collectives import collective_bytes
from rehyat_jax.cost_model.hlo_operations import executed_operations
from rehyat_jax.cost_model.tpu_target import topology_devices
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.parallel.mesh import make_mesh

TOPOLOGY, DEVICES, TOKENS_PER_FRAME = "v5e:2x4", 8, 1560


def sent(frames: int, *, softmax: bool) -> dict[str, int]:
    """Bytes that a device sends for the output and all gradients of one layer of `frames` latent frames, by kind."""
    wan = WAN_PRESETS["t2v-1.3B"]
    form = wan.hybrid
    make = lambda: tuple(
        FeatureMap(FeatureMapConfig(), heads=wan.num_heads, head_dim=wan.head_dim, rngs=nnx.Rngs(0)) for _ in range(2)
    )
    graphdef, weights = nnx.split(nnx.eval_shape(make))

    def softmax_loss(query, key, value, weights):
        del weights
        y = softmax_attention_on_mesh(query, key, value, num_tokens=frames * TOKENS_PER_FRAME)
        return y.astype(jnp.float32).sum()

    def hybrid_loss(query, key, value, weights):
        map_query, map_key = nnx.merge(graphdef, weights)
        y = hybrid_attention_on_mesh(
            query,
            key,
            value,
            map_query.inline(),
            map_key.inline(),
            num_frames=frames,
            tokens_per_frame=TOKENS_PER_FRAME,
            chunk_frames=form.chunk_frames,
            overlap_frames=form.overlap_frames,
            causal=form.causal,
            stabilizer=form.stabilizer,
        )
        return y.astype(jnp.float32).sum()

    mesh = make_mesh({"data": 1, "fsdp": 1, "context": DEVICES, "tensor": 1}, topology_devices(TOPOLOGY))
    tokens = padded_frames(frames, form.chunk_frames, DEVICES) * TOKENS_PER_FRAME
    sharding = NamedSharding(mesh, PartitionSpec(None, CONTEXT))
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((1, tokens, wan.num_heads, wan.head_dim), jnp.bfloat16, sharding=sharding)
        gradients = jax.jit(jax.value_and_grad(softmax_loss if softmax else hybrid_loss, (0, 1, 2, 3)))
        hlo = gradients.lower(x, x, x, nnx.to_pure_dict(weights)).compile().as_text()
    return collective_bytes(executed_operations(hlo, of_fusions=True), DEVICES)


def main() -> None:
    parser = CommandParser("benchmarks.context_parallel", __doc__, "--frames 21 81")
    parser.add_argument("--frames", nargs="+", type=int, default=[21, 81, 321], help="latent frames")
    parser.add_argument("--softmax", action="store_true", help="full softmax attention")
    arguments = parser.parse_args()
    rows = {frames: sent(frames, softmax=arguments.softmax) for frames in arguments.frames}
    kinds = [kind for kind in next(iter(rows.values())) if any(row[kind] for row in rows.values())]
    print("\n".join([f"| latent frames | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]))
    for frames, row in rows.items():
        print(f"| {frames} | {' | '.join(f'{row[kind] / 1e6:.2f} MB' for kind in kinds)} |")


if __name__ == "__main__":
    main()
