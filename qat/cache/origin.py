"""Whether a cache that does not know its teacher can be of the one in hand: by what it says of some rows.

Caches of the older scripts name a teacher at most, and a name is no proof; what the teacher says is.
"""

import torch
from torch import Tensor

from qat.artifacts import Artifact
from qat.cache.reader import CacheReader
from qat.errors import ArtifactError
from qat.machine import Machine
from qat.models import ModelFolder

ROWS = 4  # that are looked at
APART = 0.05  # nats; rounding alone leaves some thousandths, another model tenths and more


@torch.inference_mode()
def check(cache: Artifact, teacher: ModelFolder, machine: Machine) -> None:
    """Compares the cached top-k with the teacher's own forward pass on the first rows held out.

    Raises:
        ArtifactError: it is another model's.
    """
    reader = CacheReader(cache, "eval")
    batch = reader.batch(torch.arange(min(ROWS, reader.rows)))
    model = teacher.load(machine.dtype, machine.device)
    logits = model(input_ids=batch.input_ids.to(machine.device)).logits[:, :-1].float().cpu()
    apart = float(_divergence(batch.topk_logprobs, logits.gather(-1, batch.topk_ids))[batch.loss_mask].mean())
    if not apart <= APART:
        name = reader.meta["teacher"]["name"]
        raise ArtifactError(
            f"{cache.folder} was recorded from another model{f' ({name})' if name else ''} than {teacher.name}: on its"
            f" own top-{reader.meta['top_k']} the two are {apart:.2f} nats apart; name the model that it was made from"
        )


def _divergence(cached_BLK: Tensor, logits_BLK: Tensor) -> Tensor:
    """KL [B, L] over the cached tokens alone: an older cache does not know what all others add up to."""
    p, q = cached_BLK.log_softmax(-1), logits_BLK.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
