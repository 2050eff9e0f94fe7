"""The name that marks the residuals of fused attention kernels, so that a remat policy can keep them."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION_RESIDUALS = "attention_residuals"
"""The name to give to `jax.checkpoint_policies.save_only_these_names` or a similar policy.

No forward kernel of a video's self-attention then runs twice. The residuals are about as large as its output.
"""


def kept(results: Any) -> Any:
    """The tree with its arrays marked. Mark a kernel's output first, then use it both as residual and as output."""
    return jax.tree.map(lambda array: checkpoint_name(array, ATTENTION_RESIDUALS), results)
