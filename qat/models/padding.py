"""Rows of embedding and head behind a tokenizer's last token: they fill a matrix up and stand for no text.

Models of one family often have one tokenizer and heads of different lengths (Qwen2.5: 151,936 rows at 0.5 B, 152,064 at
7 B). A teacher whose head is the longer one is loaded with as many rows as its student has, so that whatever works with
it, text that it writes included, sees a model of the student's vocabulary.
"""

import copy
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from qat.errors import ConfigError


def described(config: PreTrainedConfig, rows: int) -> PreTrainedConfig:
    """The configuration of the same model with so many rows."""
    found = copy.deepcopy(config)
    cast(Any, found.get_text_config()).vocab_size = rows
    return found


def cut(folder: Path, model: PreTrainedModel, wanted: PreTrainedModel) -> None:
    """Leaves a model the first rows of its embedding and head; one that has no more stays as it is.

    Args:
        folder: of the model.
        model: plain; a head that is tied stays so.
        wanted: of the same configuration with fewer rows, without memory behind it.

    Raises:
        ConfigError: other tensors of this architecture depend on the number of rows too.
    """
    own, theirs = (cast(Any, one.config.get_text_config()) for one in (model, wanted))
    rows, fewer = int(own.vocab_size), int(theirs.vocab_size)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied pair is one tensor
    for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        for name, parameter in module._parameters.items():
            if parameter is not None and len(parameter) == rows:
                short = nn.Parameter(parameter.detach()[:fewer], parameter.requires_grad)  # no copy: few rows go
                module._parameters[name] = made.setdefault(parameter, short)
        for counted in ("num_embeddings", "out_features"):
            if vars(module).get(counted) == rows:
                setattr(module, counted, fewer)
    own.vocab_size = fewer
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.state_dict().items()}
    if differing := sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name)):
        raise ConfigError(
            f"{folder} has {rows:,} rows in embedding and head, and its {differing[0]} does not let it have {fewer:,}:"
            " resize it (resize_token_embeddings) and save it"
        )
