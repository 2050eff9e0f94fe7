"""Measures the compilation of a step's gradient: python -m rehyat_jax.benchmarks.compile_time [--preset NAME].

Blocks are scanned, so 30 layers should compile as fast as 3. Each form of attention is compiled once, however many
blocks have it. Weights and inputs are abstract: nothing is allocated.
"""

import time

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model


def seconds_to_compile(config: WanConfig, *, frames: int = 6) -> float:
    """Seconds to lower and compile loss and gradient of all parameters, without any cache."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), remat="block")))
    shapes = [(1, frames, 6, 6, config.in_channels), (1,), (1, config.text_length, config.text_dim)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    loss = lambda params, *x: jnp.square(apply_model(graphdef)(params, *x)).mean()
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.value_and_grad(loss)).lower(nnx.to_pure_dict(state), *inputs).compile()
    return time.perf_counter() - start


def main() -> None:
    parser = CommandParser("benchmarks.compile_time", __doc__, "--preset tiny")
    parser.add_argument("--preset", choices=sorted(WAN_PRESETS), default="t2v-1.3B")
    parser.add_argument("--repeats", type=int, default=3, help="compilations of each; the fastest counts")
    arguments = parser.parse_args()
    preset = WAN_PRESETS[arguments.preset]

    fastest = lambda config: min(seconds_to_compile(config) for _ in range(arguments.repeats))

    print(f"{arguments.preset}, gradient of all parameters; {describe_environment()}\n")
    print("| blocks | 3 layers, s | 30 layers, s | ratio |\n|---|---|---|---|")
    for name, hybrid_blocks in (("softmax", ()), ("two hybrid", (0, 2)), ("all hybrid", "all")):
        few, many = (fastest(preset.replace(num_layers=layers, hybrid_blocks=hybrid_blocks)) for layers in (3, 30))
        print(f"| {name} | {few:.2f} | {many:.2f} | {many / few:.2f} |", flush=True)

    print("\n| forms of attention in 30 layers | s | ratio to one form |\n|---|---|---|")
    one = None
    for count in (1, 2, 3, 4):
        forms = tuple(HybridConfig(chunk_frames=1 + layer % count) for layer in range(30))
        seconds = fastest(preset.replace(num_layers=30, hybrid_blocks="all", hybrid=forms))
        one = one or seconds
        print(f"| {count} | {seconds:.2f} | {seconds / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
