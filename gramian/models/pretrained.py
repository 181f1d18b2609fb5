"""The base of all Gramian models of transformers: initialisation, loading, size of the state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self

from gramian.filters import Filter
from gramian.mixers import Mixer, ShortConvolution
from gramian.mixers.linear_recurrence import Dynamics
from gramian.models.blocks import GramianMLP
from gramian.models.cache import GramianCache
from gramian.models.configuration import GramianConfig
from gramian.models.initialization import Keeping, is_read, reset_unwritten
from gramian.models.layers import BLOCKS
from gramian.ops.packed import Packing, can_pack

__all__ = ["GramianPreTrainedModel"]


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Gathers the parameters of a module that FSDP2 has sharded, outside of its forward."""
    sharded: list[Any] = [part for part in module.modules() if hasattr(part, "unshard")]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


class GramianPreTrainedModel(PreTrainedModel):
    """Initialisation, saving, loading and the size of the generation state."""

    config: GramianConfig
    config_class = GramianConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # A list, here and below, is transformers' own convention.
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = True
    _supports_context_parallel = False
    # Filters and dynamics keep themselves in float32: the first list tells quantizers to keep out
    # of them too, the second one loading in bfloat16. The same name in both is refused.
    _keep_in_fp32_modules = [r".*\.mixer\.(?:filter|dynamics)"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [r"mixer\.(?:filter|dynamics)"]  # noqa: RUF012
    _packing: Packing | None = None  # set by compile_decoding

    def __init__(self, config: GramianConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._no_split_modules = [BLOCKS[config.block].__name__]
        if config.input_size is not None:
            self.main_input_name = "input_values"
            self._input_embed_layer = "input_proj"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._packing is not None and not torch.compiler.is_compiling():
            for given in (*args, *kwargs.values()):
                if isinstance(given, GramianCache):
                    with self._packing.generation(given, begins=given.batch_size < 0):
                        return super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Training mode, or evaluation mode; training drops the packed copies of the weights."""
        if mode and self._packing is not None:
            self._packing.clear()
        return super().train(mode)

    def state_bytes(self, batch: int = 1, context: int = 1) -> int:
        """Bytes that `batch` sequences keep between two tokens after `context` tokens.

        The sum over layers of the bytes of the state of the mixer's recurrence, asked of the
        recurrence itself and equal to `GramianCache.nbytes`; nothing is run. No convolution's state
        grows with the context: a modal filter's has one complex number per mode and stream, an FIR
        filter's its last inputs, bounded by `max_position_embeddings` from the first token on.
        Attention's keys and values grow up to its window, their room doubling each time. The
        snapshot of the filters is not counted: it belongs to the model and is shared by the batch.
        Where FSDP2 has sharded the model, all its processes call this together.

        Raises:
            ValueError: if `batch` or `context` is below 1, or the model is bidirectional, which
                keeps no state.
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

    def compile_decoding(self, enabled: bool = True, **options: Any) -> None:
        """Make steps of one token fast: what `generate` does after the prompt.

        What a layer does between its projections is compiled, at the first step of each batch size,
        and on a CPU, where a cache is given, the projections multiply by packed copies of their
        weights, which cost the memory of the weights once more. Results are the same up to
        rounding. Copies follow the weights: whoever changes them, and however, every generation
        compares the whole of them before it uses a copy, and training drops the copies. Within one
        generation, from one empty cache on, a change is seen by the version of a weight or by a few
        of its values, so not an edit of single values through `.data` or numpy. What cannot be
        compiled (attention and online convolution are not) runs as it is; if compiling fails, one
        warning says so. `generate(..., compile_config=CompileConfig(...))` does the same.

        Args:
            enabled: False undoes it.
            options: for `torch.compile`: `backend`, `mode` and `options`.
        """
        packing = Packing() if enabled and can_pack() else None
        for module in self.modules():
            if isinstance(module, GramianPreTrainedModel):
                module._packing = packing
            elif isinstance(module, Mixer):
                module.compile_step(enabled, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: what is saved names this package and takes no copy of its source along."""

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        with Keeping(self) as keeping:
            super()._initialize_missing_keys(*args, **kwargs)
            reset_unwritten(self, keeping)

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        # Asked to, transformers passes over modules of other packages that own no tensor
        # themselves, as a filter made of submodules may: what is passed over is what was read.
        tensors = [*module.parameters(), *module.buffers()]
        if tensors and all(is_read(tensor) for tensor in tensors):
            return
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Projections onto the residual stream start smaller, as 2 × layers of them add up there.
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
