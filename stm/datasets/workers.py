"""How this package starts worker processes."""

import sys
import threading
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

_STARTING = threading.Lock()


class _PlainProcess(SpawnProcess):
    """A spawned process that leaves the main script alone.

    Python's own `spawn` imports the main script again in each child. Workflow scripts have no main guard: their
    children would start the whole stage again and die. The functions that run here are all importable.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _STARTING:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main


class PlainSpawn(SpawnContext):
    """The multiprocessing context of such processes. Not fork: the parent may have threads, and libraries with locks."""

    Process = _PlainProcess
