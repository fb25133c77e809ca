"""A forward pass over whole rows: fused or compiled, computed twice to save memory, or as it is.

What a model computes is what its own code in transformers says, and nothing here may change it. A `Pass`
says which liberties were found to change nothing (`qat.fidelity` finds that out, by numbers); without one a
model is computed by its own code alone.

Shapes: B rows, L tokens, P = B · (L - 1) positions that predict a token, D hidden.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat import attention, masks
from qat.decoder import Decoder, decoder

FUSED = "qat_decoder"  # attribute of a model's body that holds its fused layers
BODY, PASS = "qat_body", "qat_pass"  # attributes of a model that hold its body and its `Pass`
EAGER = "eager"  # transformers' name for the attention that a model's own file defines
# Errors that a model's code may raise when it gets arguments it does not support.
FOREIGN = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)


@dataclass(frozen=True)
class Pass:
    """How a model is computed.

    Attributes:
        attention: transformers' name of an implementation. With `qat.attention`'s, masks are made without
            reading from the device; with any other all is left to the model's own code.
        product: logits are hidden states times the head's weight and nothing else.
        joined: documents that share a row do not see each other.
        fused: decoder layers may run in their fused form, where they have one.
    """

    attention: str = EAGER
    product: bool = False
    joined: bool = True
    fused: bool = True

    @property
    def plain(self) -> bool:
        """Whether no part of the pass uses the model's own code, which might wait for the device."""
        return self.attention == attention.NAME and self.product


@dataclass
class Found:
    """What a job measured about computing its teacher, kept so that nothing is measured twice.

    Attributes:
        passes: by type and kind of device, and by these, length of a row and whether documents share rows.
        streams: why decoder layers cannot be read one at a time, by type and kind of device; empty where they can.
        loops: which loop writes text, by type and kind of device: up to how many tokens it was looked at, its
            name, and whether logits are a product there.
    """

    passes: dict[tuple[Any, ...], Pass] = field(default_factory=dict)
    streams: dict[tuple[Any, ...], str] = field(default_factory=dict)
    loops: dict[tuple[Any, ...], tuple[int, str, bool]] = field(default_factory=dict)


OWN = Pass()
FAST = Pass(attention.NAME, product=True)


def use(model: nn.Module, how: Pass) -> None:
    """Sets the `Pass` that a model uses from now on."""
    for config in _configs(model):
        config._attn_implementation, config.use_cache = how.attention, False
    vars(model)[PASS] = how


@contextmanager
def attending(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, attention is computed by the implementation that transformers knows by this name."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, earlier in before:
            config._attn_implementation = earlier


def used(model: nn.Module) -> Pass:
    """How a model is computed."""
    how: Pass = vars(model).get(PASS, OWN)
    return how


def _configs(model: nn.Module) -> Iterable[Any]:
    """The configurations of a model and of its parts, each one once."""
    found = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    return {id(config): config for config in found}.values()


@contextmanager
def trying() -> Iterator[list[str]]:
    """Inside, errors of unsupported arguments are caught; the yielded list then holds the message in one line.

    Raises:
        torch.OutOfMemoryError: memory ran out, which is no answer.
    """
    said: list[str] = []
    try:
        yield said
    except torch.OutOfMemoryError:
        raise
    except FOREIGN as error:
        said.append(next(iter(str(error).splitlines()), type(error).__name__))


class _Entered(Exception):
    """Ends a forward pass where it enters a part of the model."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part


def body(model: nn.Module) -> nn.Module:
    """The part that makes hidden states of tokens: the first one that a causal model's forward pass enters.

    It is `model.base_model` in most architectures, and a decoder inside of that in some.
    """
    if BODY not in vars(model):

        def enter(part: nn.Module, _: Any) -> None:
            raise _Entered(part)

        hooks = [part.register_forward_pre_hook(enter) for part in model.modules() if part is not model]
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))
        except _Entered as entered:
            vars(model)[BODY] = entered.part
        finally:
            for hook in hooks:
                hook.remove()
    part: nn.Module = vars(model)[BODY]
    return part


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, lowest first; none where a model's body is built otherwise."""
    lists = {name: part for name, part in body(model).named_modules() if isinstance(part, nn.ModuleList)}
    depth = min((name.count(".") for name in lists), default=0)
    outer = [part for name, part in lists.items() if name.count(".") == depth]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[operator, union-attr]
    return list(max(outer, key=lambda part: (len(part) == count, len(part)), default=[]))


def hidden_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states [P, D] of every position that predicts a token.

    A row's last token predicts none and nothing before it sees it, so it is left out from the start.

    Args:
        model: a causal language model of transformers.
        inputs: `input_ids` [B, L], and `position_ids` [B, L] where documents share rows.
    """
    shortened = {name: value[:, :-1] for name, value in inputs.items()}
    fused: Decoder | None = vars(body(model)).get(FUSED)
    if fused is not None:
        return fused(**shortened)
    return run_body(model, shortened).flatten(0, 1)


def run_body(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states [B, L, D] of every position, by the layers of transformers."""
    unread: AbstractContextManager[None] = nullcontext()
    if used(model).attention == attention.NAME:
        unread = masks.unread(joined="position_ids" in inputs)
    with unread:
        output = body(model)(**inputs, use_cache=False)
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def prepare(model: nn.Module, compiled: bool, checkpointing: bool = False) -> None:
    """Sets how each decoder layer runs, whatever was set before; `prepare(model, False)` undoes it.

    Args:
        model: of transformers, with `use_cache=False`, without which every layer would be compiled anew.
        compiled: fused, where the architecture and the device allow it (`qat.decoder`), with the weights that
            layers have now; else by torch.compile. The layers share their code, so that all are compiled as one.
        checkpointing: only a layer's input is kept for the backward pass, and the rest computed again.
    """
    how = used(model)
    fused = compiled and how.fused and how.attention == attention.NAME
    vars(body(model))[FUSED] = decoder(model, checkpointing) if fused else None
    for layer in _plainly(decoder_layers(model)):
        forward = layer.forward
        if compiled:
            forward = torch.compile(forward, dynamic=False)
        if checkpointing:
            # The layers draw no random numbers, and a generator's state cannot be read while a graph is recorded.
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if compiled or checkpointing:
            layer.forward = forward


def _plainly(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Layers set back to the forward pass of their classes."""
    for layer in layers:
        vars(layer).pop("forward", None)
        yield layer
