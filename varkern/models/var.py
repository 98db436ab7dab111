"""`VAR`: the transformer that generates, as people import it."""

from collections.abc import Sequence

from torch import Tensor

from varkern.engine import generate
from varkern.models.helpers import gumbel_softmax_with_rng, sample_with_top_k_top_p_
from varkern.modules.blocks import AdaLNSelfAttn, SharedAdaLin
from varkern.modules.plain import fusable
from varkern.modules.transformer import Transformer

__all__ = ["VAR", "AdaLNSelfAttn", "SharedAdaLin", "gumbel_softmax_with_rng", "sample_with_top_k_top_p_"]


@fusable
class VAR(Transformer):
    __doc__ = Transformer.__doc__

    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Sequence[int] | Tensor | None,
        g_seed: int | None = None,
        cfg: float | Tensor = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        """Generate B images (B, in_channels, H, W) in [0, 1].

        Args:
            label_B: (B,) classes, one class for all (negative: no class), or None: drawn uniformly.
            g_seed: seed; None draws from the global generator.
            cfg: guidance; the strength grows linearly from 0 at the first scale to ``cfg`` at the last. A tensor of B
                elements guides each image by its own.
            top_k, top_p: sampling filters; off where top_k <= 0, and top_p <= 0 or >= 1.
            more_smooth: mix codes by Gumbel-softmax; for pictures, not for metrics.

        Raises ValueError for values outside their domain, before anything is drawn. `varkern.generate` returns tokens
        too and has more options.
        """
        return generate(self, B, label_B, g_seed, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth).images
