"""Run a command and write its cost as JSON: `python -I -S _usage.py FILE COMMAND ...`. Imports almost nothing.

The peak memory that the system reports for a process starts at that of its parent, so the parent has to be small.
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
