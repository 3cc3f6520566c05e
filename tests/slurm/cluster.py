"""A real Slurm on this machine, for tests: munged, one slurmctld, and a slurmd for each of several nodes.

Everything belongs to the user who runs the tests and lives in one folder: no root, no systemd, no cgroups, nothing under
/etc, no database. Accounting is what the controller remembers (`squeue --states=all`), its record of ended jobs
(`jobcomp/filetxt`), and the memory of running steps (`sstat`).
"""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread

# Debian's daemons lie where an ordinary user's PATH does not lead.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol", "sstat")
NODES = 3
CPUS = 16
START_SECONDS = 60
WATCH_SECONDS = 1
# What the accounting tells of a job, and squeue's name for it.
FIELDS = {
    "id": "JobID",
    "name": "Name",
    "comment": "Comment",
    "account": "Account",
    "partition": "Partition",
    "node": "NodeList",
    "cpus": "NumCPUs",
    "memory": "MinMemory",
    "gpus": "tres-per-job",
    "limit": "TimeLimit",
    "elapsed": "TimeUsed",
    "restarts": "RestartCnt",
    "state": "State",
}
# Without File= a node's GPUs count as missing, and File= must be a device; no job of these tests opens it.
DEVICE = "/dev/null"

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=128000 Gres=gpu:1"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# As long as credentials hold, jobs that were put back into the queue wait there.
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
# Jobs are to run on the CPU, and not to find that the GPU which they are given is unusable.
TaskProlog={folder}/bin/prolog
# squeue is asked for the state of finished jobs, so they are remembered.
MinJobAge=86400
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Nodes claim more cores, memory and GPUs than there are: the profile's requests are to fit, and the jobs are small.
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=OFF LLN=YES
PartitionName=gpu Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60 LLN=YES
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs of munge and Slurm that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


class Cluster:
    """`with Cluster(folder) as cluster:` starts it, and stops it and all of its jobs whatever happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        conf, path = folder / "slurm.conf", os.pathsep.join([str(folder / "bin"), PATH])
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(conf)}
        # Snakemake drops all of SLURM_* but a few names inside jobs, and so the way to this Slurm.
        (folder / "bin").mkdir()
        for name in ("srun", "scontrol"):
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which(name, path=PATH)} "$@"\n')
            program.chmod(0o755)
        prolog = folder / "bin/prolog"
        prolog.write_text("#!/bin/sh\necho unset CUDA_VISIBLE_DEVICES\n")
        prolog.chmod(0o755)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._peaks: dict[str, float] = {}
        self._stopped = Event()
        self._watcher = Thread(target=self._watch, daemon=True)

    def run(self, *command: str) -> str:
        """What a Slurm command prints."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def jobs(self) -> list[dict[str, str]]:
        """The accounting of all jobs, ended ones too, in the order of submission.

        Keys: those of `FIELDS`, without `comment`; rule and wildcards; exit, code and signal of an ended job; peak, the most
        memory that a step was seen with. The name is Snakemake's, of the whole run.
        """
        wanted = ",".join(f"{field}:200" for field in FIELDS.values())
        lines = self.run(
            "squeue", "--states=all", "--noheader", "--noconvert", "--sort=i", f"--Format={wanted}"
        ).splitlines()
        exits = dict(re.findall(r"(?m)^JobId=(\d+) .* ExitCode=(\S+)", self.record()))
        found = []
        for line in lines:
            values = [line[start : start + 200].strip() for start in range(0, 200 * len(FIELDS), 200)]
            job = dict(zip(FIELDS, values, strict=True))
            rule, _, job["wildcards"] = job.pop("comment").partition("_wildcards_")
            job["rule"] = rule.removeprefix("rule_").removeprefix("group_")
            job["exit"] = exits.get(job["id"], "-")
            job["peak"] = f"{self._peaks[job['id']] / 1024:.0f}M" if job["id"] in self._peaks else "-"
            found.append(job)
        return found

    def record(self) -> str:
        """The controller's record of ended jobs, a line each; one that was put back into the queue has a line more."""
        path = self.folder / "completed.txt"
        return path.read_text() if path.is_file() else ""

    def _watch(self) -> None:
        """Keeps the most memory of each job: Slurm tells it of running steps, and later only to those with a database."""
        while not self._stopped.wait(WATCH_SECONDS):
            # Steps end meanwhile, and jobs begin; what fails is asked again.
            running = self._ask("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()
            if not running:
                continue
            told = self._ask(
                "sstat", "--allsteps", "--noheader", "--parsable2", "--format=JobID,MaxRSS", "--jobs", ",".join(running)
            )
            for line in told.splitlines():
                step, _, memory = line.partition("|")
                job = step.partition(".")[0]
                if memory.endswith("K"):
                    self._peaks[job] = max(self._peaks.get(job, 0.0), float(memory[:-1]))

    def _ask(self, *command: str) -> str:
        """What a Slurm command prints, if it succeeds or not."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        ).stdout

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _start(self) -> None:
        ports = _free_ports(NODES + 1)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        (self.folder / "state").mkdir()
        names = [f"node{number}" for number in range(1, NODES + 1)]
        host = socket.gethostname().split(".")[0]
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=CPUS) for name, port in zip(names, ports[1:], strict=True)
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, user=getpass.getuser(), folder=self.folder, port=ports[0], nodes="\n".join(nodes)
            )
        )
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-{NODES}] Name=gpu File={DEVICE}\n")
        places = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge.{name}" for option, name in places.items()]
        # --force: munged would have its folder open to all users of the machine, which serves one user here.
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *munge)
        self._wait_for(lambda: (self.folder / "munge.socket").is_socket(), "munged to listen")
        self._daemon("slurmctld", "-D", "-c")
        for name in names:
            self._daemon("slurmd", "-D", "-N", name, log=f"slurmd-{name}")
        self._wait_for(self._idle, f"{NODES} idle nodes")
        self._watcher.start()

    def _idle(self) -> bool:
        return self._ask("sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%T").split() == ["idle"] * NODES

    def _daemon(self, *command: str, log: str | None = None) -> None:
        name = log or command[0]
        with (self.folder / f"{name}.out").open("wb") as out:
            # A session of its own: an interrupted test run stops its jobs first, then the daemons.
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"{', '.join(ended)} ended" if ended else f"no answer after {START_SECONDS} s"
                raise RuntimeError(f"waiting for {what}: {why}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self, characters: int = 3000) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-characters:]}"
            for path in sorted([*self.folder.glob("*.out"), *self.folder.glob("munge.log")])
        )

    def _stop(self) -> None:
        self._stopped.set()
        if self._watcher.is_alive():
            self._watcher.join()
        if {"slurmctld", "slurmd-node1"} <= self._daemons.keys():
            subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, check=False, timeout=60)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and self._ask("squeue", "--noheader").strip():
                time.sleep(0.5)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
