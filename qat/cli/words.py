"""Keeps text as typed: the value of a key that holds text is not converted to another type.

Hydra's grammar and YAML read `695e0514` as a number and `true` as a switch before anybody asks which key it
is for; as text these come back as `inf` and `True`. So every such value of a key that holds text, in lists and
sections too, is quoted before Hydra sees it, on the command line (`quoted`) and in files (`FileConfigSource`).
"""

import copy
import os
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra._internal.core_plugins import file_config_source, structured_config_source
from hydra._internal.grammar.functions import Functions
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString, Sweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from qat import options
from qat.cli import extent, schema, trusted
from qat.config import CONF, Config
from qat.config.keys import under

TEXT = "tag:yaml.org,2002:str"
NULL = "tag:yaml.org,2002:null"


def quoted(override: str, swept: bool) -> str:
    """An override in which words that Hydra would take for something else than text are quoted.

    What its grammar does not read at all is left as it is, for those who can say so.

    Args:
        override: as typed.
        swept: several values are a sweep, also of a sentence.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    hint = _hint(name, value)
    if not equals or hint is None:
        return override
    try:
        plain, words = OverridesParser(functions()).parse_override(override)._value, _words(override)._value
    except (HydraException, RecursionError):
        return override
    if isinstance(plain, Sweep | Glob) and _is_prose(name) and not swept:
        found: Any = QuotedString(value, Quote.single)
    elif isinstance(plain, ChoiceSweep) and isinstance(words, ChoiceSweep):
        listed = [_element(hint, *pair) for pair in zip(plain.list, words.list, strict=True)]
        return override if listed == plain.list else f"{key}={_sweep(plain, listed)}"
    elif isinstance(plain, list | dict) and value[0] in "[{" and not _holds_text(hint):
        found = _element(hint, plain, words)
    elif isinstance(plain, str | QuotedString | Sweep | Glob) or (plain is None and _is_optional(hint)):
        return override
    else:
        found = QuotedString(value.strip(), Quote.single) if _holds_text(hint) or hint is Any else plain
    return override if found == plain else f"{key}={Override._get_value_element_as_str(found)}"


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's folders of YAML files, in which words stay words too, and an option is called like its file."""

    read: ClassVar[dict[tuple[str, str, str], ConfigResult]] = {}  # parsed files, by folder, name and content

    def load_config(self, config_path: str) -> ConfigResult:
        """Reads a file by the schema of the group that it is an option of, or of a whole run.

        What it held is parsed once, as a launch composes up to three times and every job of a sweep once more.

        Raises:
            ConfigError: it lies among what a run left or a store gave, however it was come by, or is larger or nested
                deeper than any configuration is, or its name stands for another file too.
        """
        file = Path(os.path.join(self.path, self._normalize_file_name(config_path)))
        trusted.refuse_data(file, str(file))
        options.check_single(file)
        if file.is_file() and not file.is_relative_to(CONF):
            extent.check(file)
        content = file.read_text(encoding="utf-8") if file.is_file() else ""  # Hydra reports a missing file
        key = (f"{self.provider}:{self.path}", config_path, content)
        if key not in self.read:
            self.read[key] = self._parsed(config_path, content)
        return copy.deepcopy(self.read[key])

    def _parsed(self, config_path: str, text: str) -> ConfigResult:
        result = super().load_config(config_path)
        group, _, option = config_path.removesuffix(".yaml").rpartition("/")
        whole = not group or result.header.get("package") == "_global_"
        hint = Config if whole else schema.hint(group)
        if hint is None or not OmegaConf.is_dict(result.config):
            return result
        content = as_text(text, hint)
        if not whole and group in schema.groups():
            content.setdefault("name", option)
        result.config = OmegaConf.create(content)
        return result


class StructuredConfigSource(structured_config_source.StructuredConfigSource):
    """Hydra's registered schemas, which it would copy, all of them, before it composes, though it only reads them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "StructuredConfigSource":
        """Itself."""
        return self


def register() -> None:
    """Has Hydra read files and schemas in this way, here and when it composes a job."""
    Plugins.instance()  # registers Hydra's own readers, which are then replaced
    SourcesRegistry.instance().types |= {"file": FileConfigSource, "structured": StructuredConfigSource}


class _Words(HydraOverrideVisitor):
    """Reads every single value as the text that was typed."""

    def visitPrimitive(self, ctx: OverrideParser.PrimitiveContext) -> Any:
        read = super().visitPrimitive(ctx)
        return read if isinstance(read, str | QuotedString) else QuotedString(ctx.getText().strip(), Quote.single)


def _words(override: str) -> Any:
    """As `OverridesParser.parse_override`, with the visitor above."""
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    return _Words(functions()).visit(parser.override())


@cache
def functions() -> Functions:
    """What overrides may call, `choice(…)` and the like: its signatures are read once and not for every override."""
    return create_functions()


def _hint(name: str, value: str) -> Any:
    """The type of a key; the option of a group is a word."""
    chosen = name in (*schema.groups(), *schema.presets()) or name.startswith("hydra/")
    return str if chosen and not value.startswith("{") else schema.hint(name)


def _is_prose(name: str) -> bool:
    known = schema.keys().get(name)
    return known is not None and known.said.prose


def _element(hint: Any, plain: Any, words: Any) -> Any:
    """A value with the words of it that are text, from the value and all of its words."""
    if isinstance(plain, dict):
        return {key: _element(under(hint, str(key)), plain[key], words[key]) for key in plain}
    if isinstance(plain, list):
        return [_element(inside(hint), *pair) for pair in zip(plain, words, strict=True)]
    meant = isinstance(plain, str | QuotedString) or (plain is None and _is_optional(hint))
    if meant or not (_holds_text(hint) or hint is Any):
        return plain
    return words if isinstance(words, QuotedString) else QuotedString(words, Quote.single)  # in choice(…)


def _sweep(sweep: ChoiceSweep, listed: list[Any]) -> str:
    """A sweep over other values, as one types it; Hydra's functions take quotes off, so there are none without need."""
    text = ",".join(map(Override._get_value_element_as_str, listed))
    text = f"shuffle({text})" if sweep.shuffle else text
    return f"tag({','.join(sorted(sweep.tags))},choice({text}))" if sweep.tags else text


def as_text(content: str, hint: Any) -> dict[str, Any]:
    """What a YAML file holds, values of keys that hold text as they are written."""
    loader = get_yaml_loader()(content)
    node = loader.get_single_node()
    _tag(node, hint)
    return dict(loader.construct_document(node))


def _tag(node: yaml.Node, hint: Any) -> None:
    """Makes text of the plain values below a node that are for text; what is no mapping where one belongs is left."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _tag(value, under(hint, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _tag(value, inside(hint))
    elif (_holds_text(hint) or hint is Any) and not (node.tag == NULL and _is_optional(hint)):
        node.tag = TEXT


def inside(hint: Any) -> Any:
    """The type of a list's elements."""
    hint = schema.required(hint)
    return hint if hint is Any else next(iter(get_args(hint)), None) if get_origin(hint) is list else None


def _holds_text(hint: Any) -> bool:
    return schema.required(hint) is str


def _is_optional(hint: Any) -> bool:
    return hint is Any or NoneType in get_args(hint)
