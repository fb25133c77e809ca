"""Small accidents that happen to good files: one at a time, drawn from a seed."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STRANGE = [
    *(None, True, False, 0, -1, 1, 2, 9, 255, 1000, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J"),
    *("<script>", "ü", "\ud800", "x" * 10_000, [], {}, [1], [[]], [0, 0], [-1, 64], {"a": 1}, [None] * 300),
]
Edit = Callable[[Any, random.Random], Any]


def json_text(value: Any, dice: random.Random) -> bytes:
    """A JSON text after an accident to it or to what it holds."""
    if dice.random() < 0.8:
        changed = json_value(copy.deepcopy(value), dice)
        return json.dumps(changed, ensure_ascii=dice.random() < 0.5).encode(errors="surrogatepass")
    whole = json.dumps(value).encode()
    deep = dice.choice([b"[", b'{"a":']) * dice.choice([70, 1000, 100_000])
    return dice.choice([*broken(whole, dice), deep, b'{"kind":' + deep, whole + whole, b"null", b"[]", b'"x"', b"{}"])


def json_value(value: Any, dice: random.Random) -> Any:
    """One field missing, renamed, doubled under another name, or with a strange value."""
    places = [place for place in _places(value) if place]
    place = dice.choice(places)
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    key = place[-1]
    kind = dice.randrange(5)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[dice.choice([f"{key}x", key.upper(), "", "\x1b[31m", "a/../b"])] = inside.pop(key)
    elif kind == 2 and isinstance(inside, dict):
        inside[f"{key}_2"] = copy.deepcopy(inside[key])
    elif kind == 3 and isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
        inside[key] = dice.choice([-inside[key], inside[key] + 1, inside[key] * 2**40, str(inside[key])])
    else:
        inside[key] = dice.choice(STRANGE)
    return value


def broken(content: bytes, dice: random.Random) -> list[bytes]:
    """Bytes that a disk, a copy or a person left: each kind once."""
    at = dice.randrange(max(1, len(content)))
    flipped = content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :] if content else b"x"
    return [
        *(b"", content[:at], content[at:], flipped, content + b"\0", content[:at] + b"\xff\xfe" + content[at:]),
        *(bytes(len(content)), dice.randbytes(min(len(content), 5000)), content[: len(content) // 2] * 2),
    ]


def tensors(state: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """A dictionary of tensors in which one is missing, misplaced, misshapen, of another type, or full of no numbers."""
    names = [name for name, value in state.items() if isinstance(value, Tensor)]
    name = dice.choice(names)
    value, other = state[name], state[dice.choice(names)]
    changed = dict(state)
    if dice.random() < 0.15:
        strangers = [f"{name}x", "stranger", "lm_head.lut", "\x1b[2J", "model.layers.99.mlp.up_proj.lut"]
        changed[dice.choice(strangers)] = other.clone()
    elif dice.random() < 0.2:
        del changed[name]
    else:
        changed[name] = dice.choice(SPOILED)(value, other)
    return changed


def _filled(number: float) -> Callable[[Tensor, Tensor], Tensor]:
    def fill(value: Tensor, _: Tensor) -> Tensor:
        spoiled = value.clone()
        limits = torch.iinfo(value.dtype) if not (value.is_floating_point() or value.dtype is torch.bool) else None
        spoiled.flatten()[: max(1, value.numel() // 7)] = number if limits is None else limits.max
        return spoiled

    return fill


SPOILED: list[Callable[[Tensor, Tensor], Any]] = [
    lambda value, _: value.flatten(),
    lambda value, _: value[:-1].clone() if value.dim() else value[None].clone(),
    lambda value, _: value.mT.contiguous() if value.dim() > 1 else value[None].clone(),
    lambda value, _: torch.cat([value, value]) if value.dim() else torch.stack([value, value]),
    lambda value, _: torch.zeros((), dtype=value.dtype),
    lambda value, _: torch.zeros(0, dtype=value.dtype),
    lambda value, _: value.double() if value.is_floating_point() else value.float(),
    lambda value, _: value.to(torch.int64) if value.dtype is not torch.int64 else value.to(torch.int8),
    lambda value, _: value.to(torch.complex64) if value.is_floating_point() else value.bool(),
    lambda _, other: other.clone(),
    _filled(float("nan")),
    _filled(float("inf")),
    _filled(float("-inf")),
]


def pickled(path: Path, dice: random.Random) -> None:
    """A `.pt` file after an accident to its tensors, its bytes or its kind."""
    state = torch.load(path, weights_only=True)
    kind = dice.randrange(8)
    if kind == 0:
        path.write_bytes(dice.choice(broken(path.read_bytes(), dice)))
    elif kind == 1:
        name = dice.choice(list(state))
        strange = [None, 3, "x", [state[name]], {"a": state[name]}, state[name].to_sparse(), range, {1: 2}]
        torch.save(state | {name: dice.choice(strange)}, path)
    elif kind == 2:
        inside = dice.choice([[], {}, state[next(iter(state))], {"model_state_dict": 3}, {"model_state_dict": []}, 7])
        torch.save(inside, path)
    else:
        torch.save(tensors(state, dice), path)


def safetensors(path: Path, dice: random.Random) -> None:
    """A file of tensors after an accident to its tensors, its header or its bytes."""
    kind = dice.randrange(4)
    content = path.read_bytes()
    if kind == 0:
        path.write_bytes(dice.choice(broken(content, dice)))
    elif kind == 1:
        size = int.from_bytes(content[:8], "little")
        header = json_text(json.loads(content[8 : 8 + size]), dice)
        lies = [len(header), len(header) + 1, len(header) - 1, 0, 2**40, 2**63]
        claimed = dice.choice(lies) if dice.random() < 0.3 else len(header)
        path.write_bytes(claimed.to_bytes(8, "little") + header + content[8 + size :])
    else:
        said = _metadata(content)
        plain = {name: value for name, value in tensors(load_file(path), dice).items()}
        save_file({name: value.contiguous() for name, value in plain.items()}, path, metadata=said)


def _metadata(content: bytes) -> dict[str, str] | None:
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] | None = json.loads(content[8 : 8 + size]).get("__metadata__")
    return found


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Keys to everything in a tree of objects and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(below for key, item in inside for below in _places(item, (*place, key)))]
