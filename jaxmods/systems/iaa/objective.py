"""IAA's objective: next-token cross-entropy on the learnt tokens (spec section 3; the inherited
LLaVA loss, there is no auxiliary one).

    L = - sum_{t: label_{t+1} learnt} log p(label_{t+1} | tokens up to t) / their number

over the whole batch. The official trainer averages per-device means instead.
"""

from __future__ import annotations

import jax

from jaxmods.objectives.cross_entropy import TokenLoss, next_token_labels, token_cross_entropy


def answer_loss(
    states_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, *, piece: int = 1024
) -> TokenLoss:
    """The loss of one batch; logits exist only `piece` tokens at a time.

    Args:
      states_BTD: states after the final norm. head_DV: to logits.
      labels_BT: int, the id of each position's own token where it is learnt, else -100.
    """
    return token_cross_entropy(states_BTD, head_DV, next_token_labels(labels_BT), piece=piece)
