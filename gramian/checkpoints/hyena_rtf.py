r"""Read the published Hyena-RTF, safari's language model with rational filters (arXiv 2405.06147).

Two details are easy to miss. First, the direct term of a filter enters twice, in the kernel and as
the skip of the convolution. So tap 0 is `2 h_0` plus the aliased taps. Second, between the last
gate and the output projection, `gelu(W norm(y))` maps the channels to 384 features.

All coefficients of a published filter have one learning rate and one weight decay, 1e-3 and 0 if
the configuration does not give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from gramian.checkpoints._format import Shapes, register, setting, size
from gramian.checkpoints.hyena_lm import SafariHyena
from gramian.filters import RTF

__all__ = ["HyenaRTF"]


@register
class HyenaRTF(SafariHyena):
    """The format of a `SimpleLMHeadModel` with the layer `hyena` and `filter_cls: rtf`."""

    name = "hyena_rtf"
    filter_class = "rtf"

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(shapes, config)
        arguments = setting(self.layer, "filter_args", Mapping, {})
        truncated = arguments.get("trunc_len")  # it may be an unresolved reference, a string
        self.taps = truncated if isinstance(truncated, int) else self.length
        self.state_size = size(arguments, "state_size")
        self.denominators = size(arguments, "num_a", self.filters)
        self.constraint = setting(arguments, "constraint", str, "no")
        if self.constraint not in ("no", "l1_montel"):
            raise ValueError(
                f"constraint must be 'no' or 'l1_montel' in filter_args; got {self.constraint!r}."
            )
        self.lr = setting(arguments, "lr", (int, float), 1e-3)
        self.weight_decay = setting(arguments, "wd", (int, float), 0.0)
        projections = [shape for name, shape in shapes.items() if name.endswith("mimo_proj.weight")]
        self.mimo_size = projections[0][0] if projections else 384

    @classmethod
    def _owns(cls, names: Iterable[str]) -> bool:
        return any(".filter_fn.ab" in name for name in names)

    def _mixer_shapes(self, mixer: str) -> Shapes:
        width, inner = self.width, self.mimo_size
        return {
            **super()._mixer_shapes(mixer),
            f"{mixer}norm.weight": (width,),
            f"{mixer}mimo_proj.weight": (inner, width),
            f"{mixer}mimo_proj.bias": (inner,),
            f"{mixer}out_proj.weight": (width, inner),
        }

    def _filter_shapes(self, filter: str) -> Shapes:
        shapes: Shapes = {
            f"{filter}ab": (self.denominators + self.filters, self.state_size),
            f"{filter}h_0": (self.filters,),
        }
        if self.constraint == "l1_montel":
            shapes[f"{filter}scalar"] = (self.denominators,)
        return shapes

    def _filter_config(self) -> dict[str, Any]:
        return {
            "type": "rtf",
            "state_size": self.state_size,
            "max_length": self.taps,
            "stability": "none" if self.constraint == "no" else "montel",
            "num_denominators": self.denominators,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "optimizer_scope": "all",
        }

    def _more_config(self) -> dict[str, Any]:
        return {"hyena_mimo_size": self.mimo_size}

    def _translate_mixer(
        self, weights: Mapping[str, Tensor], theirs: str, ours: str
    ) -> dict[str, Tensor]:
        state = {
            f"{ours}mimo.0.weight": weights[f"{theirs}norm.weight"],
            f"{ours}mimo.1.weight": weights[f"{theirs}mimo_proj.weight"],
            f"{ours}mimo.1.bias": weights[f"{theirs}mimo_proj.bias"],
        }
        filter = f"{theirs}filter_fn."
        names = [name for name in weights if name.startswith(filter)]
        layer = {name.removeprefix(filter): weights[name] for name in names}
        layer["h_0"] = 2 * layer["h_0"]
        made = RTF.from_official(layer, max_length=self.taps)
        return state | {f"{ours}filter.{name}": v for name, v in made.state_dict().items()}
