"""Training after compression: distillation from the uncompressed model, with the cache seen as at run time.

`kvcompress.heal(...)` is `kvcompress.heal.heal.heal(...)`: the room and the verb have one name, so the room can be
called (https://docs.python.org/3/reference/datamodel.html#customizing-module-attribute-access).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress.heal.heal import HealResult


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> HealResult:
        from kvcompress.heal.heal import heal

        return heal(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
