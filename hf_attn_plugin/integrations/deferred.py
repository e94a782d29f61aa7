"""Gap: transformers has no hook for plugins.

Registering needs ``transformers.modeling_utils``, which takes seconds to import. So that
``import hf_attn_plugin`` costs next to nothing, registration waits until somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[], None]


def when_imported(name: str, action: Action) -> None:
    """Run ``action`` once, right after module ``name`` is imported, or now if it is already."""
    if _is_loaded(name):
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    # A module that is still being imported is in sys.modules too, but not complete.
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds one module through the other finders, and has the action run after its import.

    It stays until an import has succeeded: looking the module up is none, nor is a failure.
    """

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads like another loader, and then runs the finder's action."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # leave no trace: inspect and pickle read it
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            self.finder.action()
            sys.meta_path.remove(self.finder)
