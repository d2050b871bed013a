"""What a language model makes of a text: how unlikely each token is, given those before it.

A damaged text is unlikely, and so are some clean ones: names, numbers, other languages, and short texts, of which a
mean says little. So surprisal is compared twice: with the entropy of what the model expected there (where it expects
nothing in particular every token surprises), and with how well the same token would have fitted the other places of
the same text (a rare word surprises everywhere, a word that stands where it belongs less than elsewhere). The last is
our own. The length is among the numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


# nats, beyond which tokens are counted, of surprisal, excess over the entropy, and misplacement
LIMITS = ((4.0, 8.0, 12.0), (2.0, 5.0, 8.0), (-1.0, -0.5, 0.0))
SURPRISAL_STATISTICS = 35  # numbers a text
_LEAST = -100.0  # of log-probabilities, which are -inf for tokens that a model never says
_CHUNK = 256  # positions whose logits are in memory at the same time


def token_surprisal(states: Tensor, targets: Tensor, mask: Tensor, readout: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each token, in nats:

    - its surprisal s = -log p(token | those before it);
    - the excess s - H(p( . | those before it)) over the entropy;
    - its misplacement, s + log of the mean of p(token | those before place j) over all places j of the text: below 0
      for a token that is likelier at its place than elsewhere.

    Args:
        states: (B, N, D), of the positions before the targets, as the output layer reads them.
        targets, mask: (B, N), token ids, and True for those that are there.
        readout: states (B, n, D) -> logits (B, n, K).

    Returns:
        (3, B, N), float32; 0 where there is no token.
    """
    chunks = [slice(None)]
    if not torch.compiler.is_compiling():  # the number of chunks of a traced program would hang on the input's size
        size = max(1, _CHUNK // max(1, targets.shape[0]))
        chunks = [slice(start, start + size) for start in range(0, targets.shape[1], size)]
    found = []
    elsewhere = torch.full_like(targets, -torch.inf, dtype=torch.float32)
    for places in chunks:
        logarithms = readout(states[:, places]).float().log_softmax(-1).clamp_min(_LEAST)  # (B, n, K)
        surprisal = -logarithms.gather(-1, targets[:, places, None])[..., 0]
        found.append(torch.stack([surprisal, surprisal + torch.linalg.vecdot(logarithms.exp(), logarithms)]))
        here = logarithms.gather(-1, targets[:, None].expand(-1, logarithms.shape[1], -1))  # (B, n, N)
        here = here.masked_fill(~mask[:, places, None], -torch.inf)
        elsewhere = torch.cat([elsewhere[:, None], here], 1).logsumexp(1)
    own = torch.cat(found, 2) if found else elsewhere.new_zeros(2, *targets.shape)
    misplacement = own[:1] + elsewhere - mask.sum(1, keepdim=True).clamp_min(1).log()
    return torch.cat([own, misplacement]).masked_fill(~mask, 0)


def surprisal_statistics(tokens: Tensor, mask: Tensor) -> Tensor:
    """Statistics of the texts of a batch, each by itself.

    Args:
        tokens: (3, B, N), from `token_surprisal`.
        mask: (B, N), True for tokens that count.

    Returns:
        (B, `SURPRISAL_STATISTICS`), float32 and finite, also for a text without tokens.
    """
    if mask.shape[1] == 0:
        tokens, mask = F.pad(tokens, (0, 1)), F.pad(mask, (0, 1))
    keep = mask.float()
    count = keep.sum(1).clamp_min(1)
    root = count.sqrt()

    def mean(values: Tensor) -> Tensor:
        return (values * keep).sum(1) / count

    found = [count.log(), root]
    for values, limits in zip(tokens.masked_fill(~mask, 0), LIMITS, strict=True):
        first, second = mean(values), mean(values.pow(2))
        # the chance deviation of a mean goes with the root of the length
        found += [first, first * root, values.masked_fill(~mask, -torch.inf).amax(1)]
        found += [second.sqrt(), (second - first.pow(2)).clamp_min(0).sqrt()]
        for limit in limits:
            beyond = (values > limit).float()
            found += [mean(beyond), (beyond * keep).sum(1)]
    return torch.stack(found, 1).masked_fill(~mask.any(1)[:, None], 0)
