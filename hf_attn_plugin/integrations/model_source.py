"""Gap: transformers does not say which model classes call the attention interface.

Its own heuristic (``_can_set_attn_implementation``) looks at a whole file: a file that calls the
interface in one model passes for all models in it. Here the source of a class is followed through
the classes that it builds.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from types import ModuleType
from typing import Any

# A class picked by the implementation's name from a table that knows only transformers' own names.
_PICKED_BY_NAME = re.compile(r"_CLASSES\[\s*(?:\w+\.)?_?attn_implementation\s*\]")
_FROM_FAMILY = re.compile(r"^from \.\.\w+\.modeling_\w+ import (\([^)]*\)|.*)$", re.MULTILINE)
_OWN_ATTENTION = re.compile(r"^class \w*Attention\w*\(nn\.Module\):", re.MULTILINE)
_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_LAYER = re.compile(r"past_key_value|position_embeddings|rotary")
_ATTENTION_CODE = re.compile(r"softmax|scaled_dot_product|MultiheadAttention|get_interface\(")


@functools.cache
def uses_interface(model_class: Any) -> bool:
    """Whether the attention of a model class goes through the interface."""
    elsewhere = _library_models(model_class)
    if elsewhere and not any(map(_is_layer, _sources(model_class).values())):
        return any(uses_interface(part) for part in elsewhere)
    if not model_class._can_set_attn_implementation():
        return False
    # Its base class names all models of the file, and builds none of them.
    sources = _sources(model_class, through_base=False)
    if any(_PICKED_BY_NAME.search(source) for source in sources.values()):
        return False
    own = [source for source in sources.values() if _OWN_ATTENTION.search(source)]
    calls = any("get_interface(" in source for source in sources.values())
    return calls or not own or _names_other_families(model_class, sources)


@functools.cache
def holds_attention(model_class: Any) -> bool:
    """Whether a model class attends, or builds models of other families, which may."""
    if any(holds_attention(part) for part in _library_models(model_class)):
        return True
    sources = _sources(model_class)
    if not sources or any(_ATTENTION_CLASS.search(name) for name in sources):
        return True
    if any(_ATTENTION_CODE.search(source) for source in sources.values()):
        return True
    return _builds_other_families(sys.modules[model_class.__module__])


@functools.cache
def is_language_model_without_attention(model_class: Any) -> bool:
    """Whether a model class reads tokens, and neither it nor what it builds attends."""
    config = getattr(model_class, "config_class", None)
    if config is None or not _reads_tokens(config) or getattr(config, "sub_configs", None):
        return False
    return not holds_attention(model_class)


def _library_models(model_class: Any) -> list[Any]:
    """Transformers' own models that a class from elsewhere extends, or names in its source.

    Each is judged by itself. None for a class of transformers, whose file is read as it is.
    """
    from transformers import PreTrainedModel

    if _is_library(model_class):
        return []
    named = list(model_class.__mro__[1:])
    own = sys.modules.get(model_class.__module__)
    for source in _sources(model_class).values():
        named += [getattr(own, name, None) for name in set(re.findall(r"\b[A-Z]\w*", source))]
    models = [cls for cls in named if inspect.isclass(cls) and issubclass(cls, PreTrainedModel)]
    # A family's base class names all models of its file, and is none of them.
    models = [
        cls for cls in models if _is_library(cls) and not cls.__name__.endswith("PreTrainedModel")
    ]
    return list(dict.fromkeys(models))


def _is_layer(source: str) -> bool:
    """Whether this is an attention layer of a model, and no pooling that is called attention."""
    return bool(_OWN_ATTENTION.search(source)) and bool(_LAYER.search(source))


def _is_library(cls: Any) -> bool:
    return str(cls.__module__).startswith("transformers.")


def _reads_tokens(config_class: Any) -> bool:
    fields = getattr(config_class, "__dataclass_fields__", {})
    return "vocab_size" in fields or "vocab_size" in inspect.signature(config_class).parameters


def _builds_other_families(module: ModuleType) -> bool:
    """Whether a modeling file takes classes from other families, or makes any by their configs."""
    source = inspect.getsource(module)
    made = r"^from \.\.\w+\.modeling_|\bAutoModel|\bload_backbone\("
    return bool(re.search(made, source, re.MULTILINE))


def _names_other_families(model_class: Any, sources: dict[str, str]) -> bool:
    """Whether these sources name a class of another family, or one that makes any."""
    module = inspect.getsource(sys.modules[model_class.__module__])
    taken = {"AutoModel"}
    for imported in _FROM_FAMILY.findall(module):
        taken.update(re.findall(r"\w+", imported))
    return any(
        name in taken or name.startswith("AutoModel")
        for source in sources.values()
        for name in re.findall(r"\b[A-Za-z_]\w*", source)
    )


def _sources(model_class: Any, *, through_base: bool = True) -> dict[str, str]:
    """The source of every class of the file that a class refers to, by name; empty if unknown.

    Args:
        model_class: Where to start.
        through_base: Whether to follow what the family's ``...PreTrainedModel`` refers to.
    """
    module = sys.modules.get(model_class.__module__)
    if module is None:
        return {}
    classes = _classes(module)
    found: dict[str, str] = {}
    waiting = [model_class.__name__]
    while waiting:
        name = waiting.pop()
        if name in found or name not in classes:
            continue
        found[name] = classes[name]
        if name.endswith("PreTrainedModel") and not through_base:
            continue
        waiting += re.findall(r"\b[A-Za-z_]\w*", classes[name])
    return found


@functools.cache
def _classes(module: ModuleType) -> dict[str, str]:
    """The classes and tables of a file, each with its source."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return {}
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        names = []
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        for name in names:
            found[name] = ast.get_source_segment(source, node) or ""
    return found
