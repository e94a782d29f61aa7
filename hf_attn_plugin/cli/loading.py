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


def check_device(name: str) -> None:
    """Refuse a device that torch does not know or does not find.

    Raises:
        ValueError: With torch's reason.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the device {name!r} cannot be used ({reason}): name cpu, or cuda or cuda:0 where "
            "there is one"
        ) from error


def check_dtype(name: str) -> None:
    """Refuse what is neither ``auto`` nor one of torch's floating-point types.

    Raises:
        ValueError: It is none.
    """
    import torch

    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"weights cannot be loaded as {name!r}: name auto, float32, bfloat16 or float16"
        )


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
