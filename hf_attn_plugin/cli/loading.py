"""Model folders and Hub ids named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def check_model_path(path: str) -> None:
    """Refuse what is no model by its looks, before anything is loaded or asked of the Hub.

    Raises:
        ValueError: The folder holds no model, or only an adapter.
        FileNotFoundError: There is no such folder, and Hub ids are written in another way.
    """
    folder = Path(path)
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(
            f"there is no folder {path}: name one that save_pretrained wrote, or a model's id on "
            "the Hub, such as Qwen/Qwen3-0.6B"
        )
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            raise ValueError(
                f"{path} holds a PEFT adapter: merge it into its model first (merge_and_unload)"
            )
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{path} holds no config.json: name a folder that save_pretrained wrote, or a "
                "model's id on the Hub"
            )


def load_config(path: str) -> PreTrainedConfig:
    """The config of a model folder or Hub id.

    Raises:
        ValueError: The folder holds no model, or only an adapter.
        OSError: There is no such folder or id.
    """
    from transformers import AutoConfig

    check_model_path(path)
    return AutoConfig.from_pretrained(path)


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names in ``architectures``.

    Raises:
        ValueError: transformers has no such class.
    """
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"transformers has no model class for {config.model_type} with architectures "
        f"{config.architectures}: save the model with save_pretrained, which names its class"
    )
