"""Gap: transformers has no place in a config for an attention implementation's parameters.

Any attribute set on a config is saved with it, but one that no config class declares is dropped by
``from_pretrained(..., attn_params=...)`` and does not reach the configs nested in it. Declaring
``attn_params`` as a property of the base class mends both, and adds nothing to configs without it.
"""

from __future__ import annotations

from typing import Any

from hf_attn_plugin.config import validate_attn_params

ATTRIBUTE = "attn_params"


def _get(config: Any) -> dict[str, Any] | None:
    return config.__dict__.get(ATTRIBUTE)


def _set(config: Any, values: dict[str, Any] | None) -> None:
    # While a config is built from a file, its parts have already taken up what the file says of
    # them; a value set later on is meant for all.
    building = ATTRIBUTE not in config.__dict__
    if values is None:
        config.__dict__.pop(ATTRIBUTE, None)
    else:
        config.__dict__[ATTRIBUTE] = validate_attn_params(values)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and hasattr(type(part), ATTRIBUTE):
            own = part.__dict__.get(ATTRIBUTE) if building else None
            setattr(part, ATTRIBUTE, {**values, **own} if own and values else values)


def install() -> None:
    """Declare the property; a second call changes nothing."""
    from transformers.configuration_utils import PreTrainedConfig

    if not isinstance(vars(PreTrainedConfig).get(ATTRIBUTE), property):
        setattr(PreTrainedConfig, ATTRIBUTE, property(_get, _set))


def uninstall() -> None:
    """Take the property away again."""
    from transformers.configuration_utils import PreTrainedConfig

    if isinstance(vars(PreTrainedConfig).get(ATTRIBUTE), property):
        delattr(PreTrainedConfig, ATTRIBUTE)
