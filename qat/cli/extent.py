"""Checks the size of a configuration before anything copies it.

In YAML a name may stand for a list that holds another name many times, and so on: a few lines are then gigabytes
for whoever copies them, as OmegaConf does.
"""

from pathlib import Path

import yaml

from qat.errors import ConfigError

BYTES = 1 << 20
VALUES = 100_000  # allowed values in a configuration, with all aliases written out
DEPTH = 50  # allowed depth of nested sections and lists, with all aliases written out


def check(file: Path) -> None:
    """Checks the size of a YAML file.

    Raises:
        ConfigError: it is larger or nested deeper than any configuration, or no YAML.
    """
    with open(file, "rb") as opened:
        content = opened.read(BYTES + 1)
    try:
        if len(content) > BYTES:
            raise ValueError(f"more than {BYTES:,} bytes")
        node = yaml.compose(content.decode(), yaml.SafeLoader)
        values, depth = (0, 0) if node is None else _extent(node, {})
        if values > VALUES:
            raise ValueError(f"more than {VALUES:,} values with all names written out")
        if depth > DEPTH:
            raise RecursionError
    except RecursionError:
        raise ConfigError(f"{file} is no configuration that can be read (nested too deep)") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is no configuration that can be read ({' '.join(str(error).split())})") from None


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values below a node and itself, and how deep they lie; what stands under a name counts as often as it is used."""
    if id(node) not in known:
        known[id(node)] = VALUES, DEPTH  # a node that contains itself counts as too large
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        extents = [_extent(part, known) for part in inside if isinstance(part, yaml.Node)]
        known[id(node)] = 1 + sum(count for count, _ in extents), 1 + max((deep for _, deep in extents), default=0)
    return known[id(node)]
