"""Define the model that classifies whole sequences or predicts numbers for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from gramian.models.backbone import GramianModel
from gramian.models.configuration import GramianConfig
from gramian.models.labels import classification_loss
from gramian.models.pooling import pool
from gramian.models.pretrained import GramianPreTrainedModel
from gramian.models.segments import check_arguments, read_rows

__all__ = ["GramianForSequenceClassification"]


class GramianForSequenceClassification(GramianPreTrainedModel):
    """A `GramianModel` whose hidden states are pooled and mapped to one logit for each label.

    Padding has no effect at any position, because the mask excludes it from the mixers and from the
    pooling. Only `attention_mask` marks padding, which is never inferred from token ids. Packed
    rows are passed as to `GramianModel.forward`. Their logits have one row for each sequence, in
    order.
    """

    accepts_loss_kwargs = False  # tells the Trainer that the loss is a mean over the batch

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GramianModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits of a batch of sequences, and their loss if `labels` are given.

        Args:
            labels: the targets. For classification with one label per sequence, they are integers
                (batch), scored by cross-entropy. With several labels per sequence, they are zeros
                and ones (batch, num_labels), scored by binary cross-entropy. For regression, they
                are numbers (batch, num_labels), or (batch) if `num_labels` is 1, scored by the mean
                squared error. `config.problem_type` names the kind of problem. If it is None,
                `num_labels=1` means regression. Otherwise, integers mean one label per sequence,
                and other dtypes mean several labels. A label of -100 is not scored.
            kwargs: the further arguments of `GramianModel.forward`, and `num_items_in_batch`. If
                the latter is given, it divides the summed loss in place of the number of labels.

        The other arguments and the errors are those of `GramianModel.forward`.

        Returns:
            An output with `loss`, `logits` (batch, num_labels) and `hidden_states`.

        Raises:
            ValueError: if the mask hides a whole sequence, or if the labels do not fit the kind of
                problem (`gramian.models.labels.classification_loss`).
        """
        inputs = (input_ids, inputs_embeds, input_values)
        segments = read_rows(inputs, attention_mask, position_ids, kwargs)
        check_arguments(type(self).__name__, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=segments,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )
        logits = self.score(pool(outputs.last_hidden_state, segments, self.config.pooling))
        return SequenceClassifierOutput(
            loss=None
            if labels is None
            else classification_loss(logits, labels, self.config, kwargs.get("num_items_in_batch")),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )
