"""What autograd keeps of a forward pass, counted; and the models that it is counted on."""

import torch
import transformers
from torch import nn

from qat import rows
from qat.forward import FAST, hidden_states, use

SIZES = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 80, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
}
ROWS, LENGTH = 3, 12
TOKENS = ROWS * (LENGTH - 1)  # a row's last token predicts none


def model(family: str, layers: int, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model of so many layers whose linear layers learn."""
    made, settings = FAMILIES[family]
    found = made(settings(**SIZES, num_hidden_layers=layers)).eval().to(dtype)
    use(found, FAST)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_("_proj" in name)
    return found


def inputs(joined: bool, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Rows of several documents, or of one."""
    starts = torch.zeros(ROWS, length, dtype=torch.bool)
    starts[:, [0, 5, 6]] = True
    return rows.inputs(torch.randint(60, (ROWS, length)), starts if joined else None)


def kept_bytes(made: nn.Module, given: dict[str, torch.Tensor], besides: list[torch.Tensor] = []) -> int:  # noqa: B006
    """Bytes that autograd keeps of a forward pass, each piece of memory once, weights and `besides` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*made.parameters(), *made.buffers(), *besides)}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(made, given)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())
