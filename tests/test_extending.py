"""The examples of docs/extending.md apply to the package as it is, and work."""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)

MAP = """
import jax, jax.numpy as jnp, numpy as np, torch
from flax import nnx
from rehyat_jax import FeatureMap, FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.pytorch.rehyat_torch import make_feature_map
from rehyat_jax.weights.wan.names import wan_table

config = FeatureMapConfig(features=8, kind="exponential")
phi = FeatureMap(config, heads=2, head_dim=8, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
np.testing.assert_allclose(phi(x), jnp.exp(x) / 8**0.5, rtol=1e-5)
twin = make_feature_map(2, 8, kind="exponential", features=8)
np.testing.assert_allclose(twin(torch.tensor(np.asarray(x))).detach(), phi(x), rtol=1e-5)
student = WAN_PRESETS["tiny"].replace(hybrid_blocks="all", hybrid=HybridConfig(feature_map=config))
assert type(student).from_dict(student.to_dict()) == student
shapes = {row.path: row.stacked_shape for row in wan_table(student)}
assert shapes["feature_maps.query.layer_0.kernel"] == (6, 2, 64, 8)
"""

FORM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from rehyat_jax import WanConfig, WanTransformer, softmax_attention
from rehyat_jax.attention.form import FORMS
from rehyat_jax.attention.forms.hybrid import HybridConfig

sizes = dict(num_heads=1, head_dim=12, ffn_dim=8, num_layers=2)
sizes |= dict(in_channels=2, out_channels=2, text_dim=4, text_length=2)
config = WanConfig(**sizes, hybrid_blocks="all", hybrid=(FORMS["frame"](), HybridConfig()))
assert WanConfig.from_dict(config.to_dict()) == config
model = nnx.jit(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))()
latents, text = jax.random.normal(jax.random.key(0), (1, 3, 4, 4, 2)), jnp.zeros((1, 2, 4))
assert jnp.isfinite(nnx.jit(lambda model: model(latents, jnp.array([500.0]), text))(model)).all()

seen = {}
def attend(inputs, per_block):
    output = FORMS["frame"]().attend(inputs, None, implementation=None)
    seen["arrays"] = inputs.query, inputs.key, inputs.value, output
    return output, None

@jax.jit
def run():
    unrolled = WanTransformer(config, rngs=nnx.Rngs(0), scan_layers=False)
    unrolled.forward(latents, jnp.array([500.0]), text, attend, {})
    return seen["arrays"]

*inputs, output = run()
first = softmax_attention(*(x[:, :4] for x in inputs))
np.testing.assert_allclose(output[:, :4], first, rtol=1e-5)
"""


def test_the_examples_apply_to_a_copy_and_run(tmp_path):
    shutil.copytree(ROOT / "rehyat_jax", tmp_path / "rehyat_jax", ignore=shutil.ignore_patterns("__pycache__"))
    apply = functools.partial(subprocess.run, text=True, cwd=tmp_path, check=True)
    assert len(DIFFS) == 2
    for diff in DIFFS:  # each by itself
        apply(["git", "apply", "--check", "-"], input=diff)
    for diff in DIFFS:
        apply(["git", "apply", "-"], input=diff)
    # One process for both: importing the package takes longer than the examples.
    subprocess.run([sys.executable, "-c", f"{MAP}\n{FORM}"], cwd=tmp_path, check=True)
