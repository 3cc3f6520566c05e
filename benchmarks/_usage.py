"""Runs a command and writes what it took as JSON: `python -I -S _usage.py FILE COMMAND ...`. Imports next to nothing.

A process's peak memory, as the system tells it, begins with that of the process which started it: so a small one has to.
"""

import json
import os
import sys
import time

if __name__ == "__main__":
    begin = time.perf_counter()
    process = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
    _, status, usage = os.wait4(process, 0)
    cost = [time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]
    cost.append(os.waitstatus_to_exitcode(status))
    with open(sys.argv[1], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(cost, file)
