"""Attention on TPUs by JAX's own kernel, which keeps no scores: splash attention, per device.

The compiler cannot divide a kernel, so it runs in `shard_map` over the rows and heads that a device has. A plan gives
it to the models as `Execution.kernel`.

Source: `jax.experimental.pallas.ops.tpu.splash_attention`, after Dao 2023, https://arxiv.org/abs/2307.08691.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.nn import weights
from llm_jax.nn.attend import Mask, is_ordered
from llm_jax.nn.execution import KERNEL
from llm_jax.parallel.kernel import MeshKernel, manual_axes

LANES = 128
BLOCK = 512  # queries and keys a step of the kernel


def _divisor(size: int) -> int:
    """The largest block of whole lanes that divides `size`, 0 without one."""
    return next((b for b in (BLOCK, 256, LANES) if size % b == 0), 0)


def attend_here(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    causal: bool,
    window: int | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one device's rows and heads.

    Args:
      q_BTNH: queries at 0, 1, 2, ...
      k_BSKH: keys; K divides N.
      v_BSKH: values.
      causal: a query sees keys up to its own position.
      window: a query sees the last `window` keys only.
      scale: factor of the scores.
      interpret: runs the kernel's steps one by one, on any platform.

    Returns:
      `[B, T, N, H]`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, s, n = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2]
    if window is not None:
        mask: masks.Mask = masks.LocalMask((t, s), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask((t, s)) if causal else masks.FullMask((t, s))
    a, b = _divisor(t), _divisor(s)
    blocks = kernels.BlockSizes(
        a, b, b, block_q_dkv=a, block_kv_dkv=b, block_kv_dkv_compute=b, block_q_dq=a, block_kv_dq=b
    )
    run = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KERNEL,
        interpret=interpret,
    )
    heads_first = lambda x: x.swapaxes(1, 2)
    scaled = weights.scaled(q_BTNH, scale)
    return heads_first(jax.vmap(run)(*map(heads_first, (scaled, k_BSKH, v_BSKH)))).astype(q_BTNH.dtype)


@dataclasses.dataclass(frozen=True)
class Splash(MeshKernel):
    """Splash attention on the devices of a mesh, as `Execution.kernel`; attributes as in `MeshKernel`.

    Attributes:
      interpret: runs the kernel's steps one by one, on any platform.
    """

    interpret: bool = False

    def fits(self, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask | None, sloped: bool, biased: bool) -> bool:
        """Whether the kernel takes these sizes, whole lanes, rows and heads that divide, and this mask.

        Args:
          q_BTNH: queries.
          k_BSKH: keys.
          mask: who may look where.
          sloped: ALiBi's slopes are added to the scores.
          biased: a bias is.
        """
        t, lanes = q_BTNH.shape[1], q_BTNH.shape[3] % LANES == 0
        plain = is_ordered(mask) and not sloped and not biased
        sized = lanes and t == k_BSKH.shape[1] and bool(_divisor(t)) and q_BTNH.dtype in (jnp.bfloat16, jnp.float32)
        return plain and sized and self.divides(q_BTNH, k_BSKH)

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask | None,
        slopes_N: jax.Array | None,
        scale: float,
    ) -> jax.Array:
        """Attention of whole arrays; see `attend_here` for the arguments."""
        del slopes_N
        causal, window = (False, None) if mask is None else (mask.causal, mask.window)
        inside = jax.sharding.get_abstract_mesh()
        spec = P(self.free_rows() or None, None, self.heads, None)
        run = jax.shard_map(
            functools.partial(attend_here, causal=causal, window=window, scale=scale, interpret=self.interpret),
            mesh=self.mesh if inside.empty else inside,
            in_specs=(spec, spec, spec),
            out_specs=spec,
            axis_names={*self.mesh.axis_names} - {*manual_axes()},
            check_vma=False,
        )
        return run(q_BTNH, k_BSKH, v_BSKH)
