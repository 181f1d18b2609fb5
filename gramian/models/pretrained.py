"""Define the base class of all Gramian models. It initializes, saves and loads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self

from gramian._modules import NoTorchScript
from gramian.filters import Filter
from gramian.mixers import Mixer, ShortConvolution
from gramian.mixers.linear_recurrence import Dynamics
from gramian.models.blocks import GramianMLP
from gramian.models.cache import GramianCache
from gramian.models.configuration import GramianConfig
from gramian.models.initialization import Keeping, is_read, reset_unwritten
from gramian.models.layers import BLOCKS
from gramian.models.quantization import check_readable, check_saveable, save_quanto
from gramian.ops.packed import Packing, can_pack

__all__ = ["GramianPreTrainedModel"]


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Gather the parameters that FSDP2 has sharded, for use outside of the module's forward."""
    sharded: list[Any] = [part for part in module.modules() if hasattr(part, "unshard")]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


class GramianPreTrainedModel(NoTorchScript, PreTrainedModel):
    """The base class of Gramian models, with the settings and methods that all of them share."""

    config: GramianConfig
    config_class = GramianConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # transformers expects a list here and below, not a tuple.
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = True
    _supports_context_parallel = False
    _supports_sdpa = True
    # Filters and dynamics stay in float32 without these lists when a model is cast. The first list
    # prevents quantizers from changing them, and the second prevents loading in bfloat16 from
    # casting them. The patterns differ because transformers refuses a name that is in both lists.
    _keep_in_fp32_modules = [r".*\.mixer\.(?:filter|dynamics)"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [r"mixer\.(?:filter|dynamics)"]  # noqa: RUF012

    packing: Packing | None = None
    """The packed copies of the weights, set by `compile_decoding`."""

    def __init__(self, config: GramianConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._no_split_modules = [BLOCKS[config.block].__name__]
        if config.input_size is not None:
            self.main_input_name = "input_values"
            self._input_embed_layer = "input_proj"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.packing is not None and not torch.compiler.is_compiling():
            for given in (*args, *kwargs.values()):
                if isinstance(given, GramianCache):
                    with self.packing.generation(given, begins=given.batch_size < 0):
                        return super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model as transformers does.

        Raises:
            ValueError: if optimum-quanto has quantized the weights, which `gramian.models.load`
                reads.
            ImportError: if torchao has quantized the weights, and is not installed.
        """
        if pretrained_model_name_or_path is not None:
            check_readable(Path(pretrained_model_name_or_path), kwargs.get("config"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save a model as transformers does, also if optimum-quanto has quantized its weights.

        Raises:
            ValueError: if torchao has quantized weights in place, before anything is written.
        """
        check_saveable(self)
        if hasattr(self, "hf_quantizer"):
            # Its tensors are in the format of the files already, and cannot be converted back.
            kwargs["save_original_format"] = False
        save = partial(super().save_pretrained, save_directory, *args, **kwargs)
        save_quanto(self, Path(save_directory), save)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode. Training mode drops the packed copies of the weights."""
        if mode and self.packing is not None:
            self.packing.clear()
        return super().train(mode)

    def state_bytes(self, batch: int = 1, context: int = 1) -> int:
        """Return the bytes of state that `batch` sequences keep after `context` tokens.

        The result is the sum over layers of the sizes that the mixers' recurrences report. The
        result equals `GramianCache.nbytes`, but the model does not run. The state of a convolution
        does not grow with the context. For a modal filter, the state has one complex number per
        mode and stream. For an FIR filter, the state has room for `max_position_embeddings` inputs
        from the first token on. The keys and values of attention grow until they fill the window of
        the attention. The room for keys and values doubles each time that it is full. The copies of
        the filters in the recurrences are not counted, because they do not depend on the batch. If
        FSDP2 has sharded the model, all processes must call this method together.

        Args:
            batch: number of sequences, at least 1.
            context: number of tokens of each sequence, at least 1.

        Raises:
            ValueError: if `batch` or `context` is below 1, or if the model is bidirectional and
                therefore has no state.
        """
        if batch < 1 or context < 1:
            raise ValueError(
                f"state_bytes takes a batch and a context of at least 1; got {batch} and {context}."
            )
        total = 0
        for block in self.base_model.layers:
            with torch.no_grad(), _whole(block):
                recurrence = block.mixer.recurrence()
                total += recurrence.state_bytes(batch, dtype=self.dtype, context=context)
        return total

    def make_cache(self) -> GramianCache:
        """Return an empty cache, which `forward` and `generate` accept as `past_key_values`."""
        return GramianCache(self.config)

    def compile_decoding(self, enabled: bool = True, **options: Any) -> None:
        """Make steps of one token faster. `generate` takes such steps after the prompt.

        The computation of a layer between its projections is compiled at the first step of each
        batch size. On a CPU, passes with a cache multiply by packed copies of the projections'
        weights. The copies need the same amount of memory as the weights. Results are the same up
        to rounding. Attention and online convolution are not compiled, because they cannot be. If
        compiling fails, a warning is given once. `generate(..., compile_config=CompileConfig(...))`
        has the same effect.

        The copies follow the weights. When a generation begins with an empty cache, all values of a
        weight are compared with its copy before the copy is used. So every change is detected.
        Later in the same generation, a change is detected by the version of the weight or by a few
        of its values. So an edit of single values through `.data` or numpy goes unnoticed then.
        Training mode drops the copies.

        Args:
            enabled: whether to compile; False undoes an earlier call.
            options: arguments of `torch.compile`: `backend`, `mode` and `options`.
        """
        packing = Packing() if enabled and can_pack() else None
        for module in self.modules():
            if isinstance(module, GramianPreTrainedModel):
                module.packing = packing
            elif isinstance(module, Mixer):
                module.compile_step(enabled, **options)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, "sdpa", "eager"):
            raise ValueError(
                'attn_implementation must be "sdpa" or "eager", both of which call torch\'s '
                "scaled_dot_product_attention, which chooses flash attention by itself where it "
                f"can; got {attn_implementation!r}."
            )
        return attn_implementation or "sdpa"

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing, because saved folders import this package and hold no copy of its source."""

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        with Keeping(self) as keeping:
            super()._initialize_missing_keys(*args, **kwargs)
            reset_unwritten(self, keeping)

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        # transformers skips modules of other packages that own no tensor themselves. A filter that
        # consists of submodules may own none, but it must not be skipped. So this method skips only
        # modules whose tensors were all read from files.
        tensors = [*module.parameters(), *module.buffers()]
        if tensors and all(is_read(tensor) for tensor in tensors):
            return
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Projections onto the residual stream start smaller, because the stream is a sum with two
        # of their outputs for each layer.
        small = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, Filter | ShortConvolution | Dynamics):
            module.reset_parameters()
        elif isinstance(module, Mixer):
            module.reset_parameters()
            if module.output_projection is not None:
                nn.init.normal_(module.output_projection.weight, std=small)
        elif isinstance(module, GramianMLP):
            nn.init.normal_(module.down_proj.weight, std=small)
        else:
            super()._init_weights(module)
