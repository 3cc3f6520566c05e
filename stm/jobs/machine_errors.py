"""Errors of the machine; see `stm.storage.machine_errors`."""

from stm.storage.machine_errors import MACHINE_ERRNOS, is_machine_error, is_out_of_memory, name_file

__all__ = ["MACHINE_ERRNOS", "is_machine_error", "is_out_of_memory", "name_file"]
