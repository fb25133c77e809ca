"""A model whose decoder layers stay in its files: each is read when it is computed, and forgotten for the next.

Everything else (embedding, norms, head, buffers) is in memory. Tensors go through transformers' own conversion, so
that what is read is what a model loaded whole would have; one layer at a time of it, straight from the page cache
where the type is that of the file. Whoever computes a long text should let a layer take all of it (`qat.flow`).
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from qat import model_files
from qat.errors import ConfigError
from qat.flow import Inputs, same_by_layers, through_all
from qat.forward import OWN, body, decoder_layers, hidden_states, trying, use
from qat.models import reading
from qat.quant.places import matrix, place

STREAM = "qat_stream"  # attribute of a streamed model and of its decoder layers that holds their `Stream`


class Stream:
    """The decoder layers of a model, of which at most one is in memory.

    Attributes:
        names: of the decoder layers in the model, lowest first.
        instead: matrices [O, I] by name that take the place of those in the files, made when they are needed.
    """

    def __init__(
        self, folder: Path, model: PreTrainedModel, device: torch.device, rest: "PreTrainedModel | bool" = True
    ) -> None:
        """Reads the headers of the files, and what is outside of decoder layers; see `open_stream`."""
        # Whoever has the model has this, and not the other way round: so its memory is free once it is forgotten.
        self.folder, self._model, self.device = folder, weakref.ref(model), device
        by_module = {module: name for name, module in model.named_modules()}
        self.layers = decoder_layers(model)
        self.names = [by_module[layer] for layer in self.layers]
        self.instead: dict[str, Callable[[], Tensor]] = {}
        self._here: int | None = None
        self._widened = False
        self._blank = [_tensors(layer) for layer in self.layers]  # without memory behind them
        self._how = LoadStateDictConfig(
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=cast(Any, get_model_conversion_mapping(model, None, None)),
            ignore_mismatched_sizes=True,
            device_map={"": str(device)},
        )
        self._targets: dict[str, str] = {}  # the names in the model that tensors of the files are for
        self._keys = self._sources()
        if rest is True:
            self._read_rest()
        elif rest:
            self._share_rest(rest)
        for depth, layer in enumerate(self.layers):
            vars(layer)[STREAM] = (weakref.ref(self), depth)
            layer.__class__ = _reading(cast(Any, type(layer)))

    @property
    def model(self) -> PreTrainedModel:
        """The model whose layers these are."""
        model = self._model()
        assert model is not None  # nobody else holds this
        return model

    @torch.inference_mode(False)  # whoever comes next may want gradients through it
    def bring(self, depth: int) -> None:
        """Reads a decoder layer, in place of the one that was there."""
        if self._here == depth:
            return
        self.drop()
        report = self._load(self._keys[depth])
        self._here = depth
        prefix = f"{self.names[depth]}."
        self.model._adjust_missing_and_unexpected_keys(report)
        missing = [name for name in report.missing_keys if name.startswith(prefix)]
        reading.refuse_incomplete(self.folder, nn.Module(), _as_report(report, missing))
        for parameter in self.layers[depth].parameters():
            parameter.requires_grad_(False)
        for name in [name for name in self.instead if name.startswith(prefix)]:
            _replace(self.model, name, self.instead[name]())
        if self._widened:
            _widen(self.layers[depth])

    def drop(self) -> None:
        """Forgets the layer that is in memory."""
        if self._here is not None:
            for (module, kind, name), blank in self._blank[self._here].items():
                getattr(module, kind)[name] = blank
        self._here = None

    def weight(self, name: str) -> Tensor:
        """The matrix [O, I] of that name; of one outside of decoder layers that was not read, a copy."""
        depth = next((depth for depth, one in enumerate(self.names) if name.startswith(f"{one}.")), None)
        if depth is not None:
            self.bring(depth)
        found = place(self.model, name)
        if found is None:
            raise KeyError(name)
        return self._outside(name) if found.weight.is_meta else found.weight

    def _outside(self, name: str) -> Tensor:
        """Reads one matrix outside of decoder layers, which the model does not keep."""
        tied = dict(self.model.all_tied_weights_keys)
        names = {f"{name}.weight", tied.get(f"{name}.weight"), *(k for k, v in tied.items() if v == f"{name}.weight")}
        keys = {key: file for key, file in self._keys[None].items() if self._targets[key] in names}
        blank = {one: self.model.get_parameter(self._targets[one]) for one in keys}
        self._load(keys)
        for key, parameter in blank.items():
            owner, _, leaf = self._targets[key].rpartition(".")
            module = self.model.get_submodule(owner)
            found, module._parameters[leaf] = cast(Tensor, module._parameters[leaf]), parameter
        return found.detach()

    def put(self, matrices: dict[str, Callable[[], Tensor]]) -> None:
        """Lets matrices [O, I] take the place of those of these names from here on."""
        self.drop()
        self.instead |= matrices
        inside = tuple(f"{name}." for name in self.names)
        for name, made in matrices.items():
            if not name.startswith(inside):
                _replace(self.model, name, made())

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Inside, decoder layers are fp32 numbers of what they are."""
        self.drop()
        self._widened = True
        try:
            yield
        finally:
            self.drop()
            self._widened = False

    def _sources(self) -> dict[int | None, dict[str, Path]]:
        """The tensors of the files by name, with their file, for each decoder layer; None is all that is outside."""
        mapping = self._how.weight_mapping or []
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        there, prefix = self.model.state_dict(), self.model.base_model_prefix
        depths = {name: depth for depth, name in enumerate(self.names)}
        found: dict[int | None, dict[str, Path]] = {None: {}} | {depth: {} for depth in depths.values()}
        for file in model_files.weights(self.folder):
            with reading.understood(f"{file} cannot be read: {model_files.REMEDY}"), safe_open(file, "pt") as opened:
                keys = list(opened.keys())
            for key in keys:
                name, _ = rename_source_key(key, renamings, converters, prefix, there)
                if name not in there and key in there:
                    name = key
                depth = next((depths[head] for head in _heads(name) if head in depths), None)
                found[depth][key], self._targets[key] = file, name
        return found

    def _read_rest(self) -> None:
        report, kind = self._load(self._keys[None]), type(self.model)
        inside = tuple(f"{name}." for name in self.names)
        later = {name for name in report.missing_keys if name.startswith(inside)}
        report.missing_keys -= later
        with reading.LOADING:
            kind._finalize_model_loading(self.model, self._how, report)
        missing = report.missing_keys - set(self.model.all_tied_weights_keys)
        reading.refuse_incomplete(self.folder, _Outside(self.model, inside), _as_report(report, missing))
        self.model.eval().requires_grad_(False)

    def _share_rest(self, other: PreTrainedModel) -> None:
        """Takes over what another model of the same files has outside of decoder layers."""
        layers = {module for layer in self.layers for module in layer.modules()}
        for mine, theirs in zip(self.model.modules(), other.modules(), strict=True):
            if mine not in layers:
                mine._parameters |= theirs._parameters
            mine._buffers |= {
                name: value
                for name, value in theirs._buffers.items()
                if mine not in layers or name in mine._non_persistent_buffers_set
            }
        self.model.eval().requires_grad_(False)

    def _load(self, keys: dict[str, Path]) -> Any:
        """Reads tensors into the model; what transformers says of them."""
        with ExitStack() as stack:
            stack.enter_context(reading.LOADING)
            stack.enter_context(reading.understood(f"{self.folder} cannot be loaded"))
            files = {file: stack.enter_context(safe_open(file, "pt")) for file in dict.fromkeys(keys.values())}
            slices = {key: files[file].get_slice(key) for key, file in keys.items()}
            report, _ = convert_and_load_state_dict_in_model(self.model, slices, self._how)
        if report.conversion_errors:
            raise ConfigError(
                f"{self.folder} lacks some of what {reading.listed(sorted(report.conversion_errors))} is made from, or"
                f" has it in other shapes: {model_files.REMEDY}"
            )
        return report


def stream_of(model: nn.Module) -> Stream | None:
    """How a model's decoder layers are read; None for a model that is in memory."""
    found: Stream | None = vars(model).get(STREAM)
    return found


def matrix_of(model: PreTrainedModel, name: str) -> Tensor:
    """A matrix [O, I] of a model by name; of one in files it is valid for as long as its decoder layer is here.

    Raises:
        KeyError: there is none.
    """
    stream = stream_of(model)
    return matrix(model, name) if stream is None else stream.weight(name)


def open_stream(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    rest: PreTrainedModel | bool = True,
) -> PreTrainedModel:
    """A model for inference, by its own code with eager attention, whose decoder layers stay in the files.

    Args:
        folder: of the files.
        config: of the model.
        dtype: of its numbers.
        device: computes.
        rest: what is outside of decoder layers is read, or shared with another such model, or left out.

    Raises:
        ConfigError: it does not lie there whole.
        NotImplementedError: its layers cannot be told apart in it or its files; the text says why.
    """
    if any(file.suffix != ".safetensors" for file in model_files.weights(folder)):
        raise NotImplementedError("its files are pickles")
    with reading.LOADING, reading.understood(f"{folder} cannot be loaded"), torch.device("meta"):
        model = cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=OWN.attention, trust_remote_code=False
            ),
        )
    use(model, OWN)
    found: list[nn.Module] = []
    with trying():
        found = decoder_layers(model)
    if not found:
        raise NotImplementedError("it has no list of decoder layers")
    _refuse_shared(model)
    vars(model)[STREAM] = Stream(folder, model, device, rest)
    return model


@torch.inference_mode()
def inspect(folder: Path, model: PreTrainedModel) -> bool:
    """Looks at every number once, and at what two rows that begin alike show; see `qat.models.reading`.

    Args:
        folder: of the model.
        model: streamed.

    Returns:
        Whether running layer after layer gives the same of them as the model.

    Raises:
        ConfigError: a number is none, or logits depend on what comes later.
    """
    stream = cast(Stream, stream_of(model))
    reading.refuse_not_finite(folder, model)
    for depth, name in enumerate(stream.names):
        stream.bring(depth)
        reading.refuse_not_finite(folder, stream.layers[depth], f"{name}.")
    seen: list[Tensor] = []
    hook = body(model).register_forward_hook(
        lambda _, __, made: seen.append(made if isinstance(made, Tensor) else made[0])
    )
    try:
        ids = reading.refuse_foresight(folder, model)
    finally:
        hook.remove()
    return same_by_layers(model, {"input_ids": ids}, seen[0])


def each_hidden(model: nn.Module, text: Iterable[Inputs], scratch: Path | None = None) -> Iterator[Tensor]:
    """Last hidden states [P, D] of each micro-batch, as of `forward.hidden_states`.

    Decoder layers that lie in files are read once for all of them.
    """
    if stream_of(model) is None:
        yield from (hidden_states(model, inputs) for inputs in text)
        return
    shortened = [{name: value[:, :-1] for name, value in inputs.items()} for inputs in text]
    for states in through_all(model, shortened, scratch):
        yield states.flatten(0, 1)


class _Outside(nn.Module):
    """The part of a model outside of its decoder layers, as `refuse_incomplete` looks at it."""

    def __init__(self, model: nn.Module, inside: tuple[str, ...]) -> None:
        super().__init__()
        self._found = {name: x for name, x in model.state_dict().items() if not name.startswith(inside)}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Its tensors by name."""
        return self._found


def _as_report(report: Any, missing: Any) -> dict[str, Any]:
    return {**report.to_dict(), "missing_keys": missing}


def _refuse_shared(model: nn.Module) -> None:
    """Refuses decoder layers that share a tensor with each other or with the rest."""
    layers = decoder_layers(model)
    inside = [parameter for layer in layers for parameter in layer.parameters()]
    within = {module for layer in layers for module in layer.modules()}
    outside = {id(p) for module in model.modules() if module not in within for p in module._parameters.values()}
    if len({id(parameter) for parameter in inside}) < len(inside) or any(id(one) in outside for one in inside):
        raise NotImplementedError("its decoder layers share tensors")
    if next(model.parameters()) is inside[0]:
        raise NotImplementedError("its decoder layers come before its embedding")


def _tensors(layer: nn.Module) -> dict[tuple[nn.Module, str, str], Tensor]:
    """The tensors of a layer that files hold: module, `_parameters` or `_buffers`, and name."""
    found: dict[tuple[nn.Module, str, str], Tensor] = {}
    for module in layer.modules():
        found |= {(module, "_parameters", name): x for name, x in module._parameters.items() if x is not None}
        kept = {name: x for name, x in module._buffers.items() if name not in module._non_persistent_buffers_set}
        found |= {(module, "_buffers", name): x for name, x in kept.items() if x is not None}
    return found


def _heads(name: str) -> Iterator[str]:
    """The names of all modules that a tensor lies in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _replace(model: nn.Module, name: str, weight: Tensor) -> None:
    """Sets the matrix [O, I] of that name, in the type and on the device of the one that is there."""
    found = place(model, name)
    if found is None:
        raise KeyError(name)
    old = found.module.get_parameter(found.parameter)
    weight = weight.to(old.device, old.dtype)
    weight = weight.mT if found.transposed else weight
    if found.number is not None:
        whole = old if getattr(old, "qat_own", False) else nn.Parameter(old.detach().clone(), requires_grad=False)
        whole.qat_own = True  # type: ignore[attr-defined]
        whole.data[found.number] = weight
        weight = whole
    made = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.contiguous(), requires_grad=False)
    for module in model.modules() if found.number is None else [found.module]:
        for parameter, value in module._parameters.items():
            if value is old:  # a tied head has the same tensor
                module._parameters[parameter] = made


def _widen(layer: nn.Module) -> None:
    for (module, kind, name), value in _tensors(layer).items():
        if value.dtype in (torch.bfloat16, torch.float16):
            wide = value.detach().float()
            kept = nn.Parameter(wide, requires_grad=False) if kind == "_parameters" else wide
            getattr(module, kind)[name] = kept


@cache
def _reading(kind: type[nn.Module]) -> Any:
    """A subclass of a decoder layer that has itself read before it is computed."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        stream, depth = vars(self)[STREAM]
        stream().bring(depth)
        return kind.forward(self, *given, **named)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
