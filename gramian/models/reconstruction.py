"""Define the model that reconstructs a sequence of tokens from one vector.

The model is made for the compression task of the MAD suite (Poli et al., arXiv 2403.17844). The
hidden states are pooled to one vector. In the published task, this vector is the hidden state of
the last token. For every position, the decoder adds a sinusoidal code to the vector and predicts
the token through two layers. So all information about the sequence passes through this vector.
Unlike in the published model, the model's last norm is applied before the pooling.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils import can_return_tuple

from gramian.mixers import Segments
from gramian.models.backbone import GramianModel
from gramian.models.configuration import GramianConfig
from gramian.models.labels import check_classes, cross_entropy
from gramian.models.norms import make_norm
from gramian.models.pooling import pool
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.segments import check_arguments, read_rows

__all__ = ["GramianForReconstruction"]


class GramianForReconstruction(GramianPreTrainedModel):
    """A `GramianModel` with a decoder that predicts the input from the pooled hidden state.

    `config.pooling` names the pooling; the published model uses `"last"`. Rows may be packed, as
    for `GramianModel.forward`. Each sequence of a packed row is pooled to a separate vector.
    """

    accepts_loss_kwargs = False  # tells the Trainer that the loss is a mean over the batch

    def __init__(self, config: GramianConfig) -> None:
        if config.input_size is not None:
            raise ValueError(
                f"reconstruction is of tokens: input_size must be None; got {config.input_size}."
            )
        super().__init__(config)
        self.model = GramianModel(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.decoder = nn.Sequential(
            make_norm("rms", width, eps),
            nn.Linear(width, width),
            nn.GELU(),
            make_norm("rms", width, eps),
            nn.Linear(width, width),
            nn.GELU(),
            make_norm("rms", width, eps),
        )
        self.head = nn.Linear(width, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Return the logits of the token at every position, and their loss if `labels` are given.

        Args:
            labels: (batch, length) token ids at their own positions, or -100 for positions to
                ignore. To reconstruct the whole input, pass `input_ids`.
            kwargs: the further arguments of `GramianModel.forward`, and `num_items_in_batch`. If
                the latter is given, it divides the summed loss in place of the number of labels.

        The other arguments and the errors are those of `GramianModel.forward`.

        Returns:
            An output with `loss`, the mean cross-entropy; `logits`, (batch, length, vocab_size);
            and `hidden_states`. The codes of positions count real tokens only. Outputs at padding
            are meaningless.

        Raises:
            ValueError: if the mask hides a whole sequence, or if labels have another shape or
                dtype, are outside of the vocabulary, or are all ignored.
        """
        segments = read_rows((input_ids, inputs_embeds), attention_mask, position_ids, kwargs)
        check_arguments(type(self).__name__, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=segments,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )
        hidden_states = outputs.last_hidden_state
        batch, length = hidden_states.shape[:2]
        code = pool(hidden_states, segments, self.config.pooling)  # (sequences, width)
        sequence, positions = _places(segments, batch, length, code.device)
        places = position_codes(positions, code.shape[-1]).to(code.dtype)
        codes = code.unsqueeze(1) if sequence is None else code[sequence]  # (batch, 1 or length, …)
        logits = self.head(self.decoder(codes + places))
        loss = None
        if labels is not None:
            labels = check_classes(labels.to(logits.device), logits.shape[-1], [(batch, length)])
            loss = cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def _places(
    segments: Segments | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return the sequence of every position, and the position of its token within the sequence.

    Returns:
        Two int64 tensors (batch, length). The first is None if every row is one sequence. The
        second is (length) if there is no padding.
    """
    if segments is None:
        return None, torch.arange(length, device=device)
    if not segments.packed:
        assert segments.real is not None
        return None, (segments.real.long().cumsum(-1) - 1).clamp_min(0)
    tokens, begins, lengths = segments.sequences()
    sequence = torch.repeat_interleave(lengths)
    places = tokens.new_zeros(2, batch * length)
    places[0, tokens] = sequence
    places[1, tokens] = torch.arange(len(tokens), device=tokens.device) - begins[sequence]
    sequence, positions = places.unflatten(1, (batch, length))
    return sequence, positions


def position_codes(positions: Tensor, width: int) -> Tensor:
    """Return the sinusoidal codes of positions.

    Let half = ⌊width / 2⌋. The angles are position × 10,000^(-k / (half - 1)) for k = 0 … half - 1.
    A code consists of the sines of the angles, then of their cosines. If the width is odd, a zero
    follows.

    Args:
        positions: the positions, (…).
        width: length of a code.

    Returns:
        (…, width), float32.
    """
    half = width // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32)
    angles = positions.unsqueeze(-1) * torch.exp(steps * (-math.log(10_000) / max(half - 1, 1)))
    codes = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return nn.functional.pad(codes, (0, width % 2))
