"""A SLURM cluster of two nodes on this machine: Debian's daemons, on the loopback interface, in a folder of their own.

Each node claims four cores and a GPU, which is /dev/null. Nothing outside of the folder is written. As on many small
clusters there is no accounting, so states come from squeue.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
# Daemons lie in folders that are not on every path.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("node1", "node2")
CONFIGURATION = """
ClusterName=moescope
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
# The nodes share this machine, and each may claim more than there is.
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=2
SlurmctldTimeout=60
SlurmdTimeout=60
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=64000 Gres=gpu:toy:1
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=64000 Gres=gpu:toy:1
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def missing() -> str:
    """What this machine lacks for a cluster, as a sentence; empty if it lacks nothing."""
    lacking = [command for command in COMMANDS if not shutil.which(command, path=PATH)]
    return f"no {', '.join(lacking)} (apt-get install munge slurmctld slurmd slurm-client)" if lacking else ""


@dataclass
class Cluster:
    """A running cluster; `environment` is what its commands, and whatever calls them, need."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        """Start a daemon that stays in the foreground, so that it can be told to end."""
        with (self.folder / f"{name}.log").open("a") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def stop(self, name: str) -> None:
        """End a daemon, by force if it does not want to."""
        daemon = self.daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def start_controller(self) -> None:
        """Start the controller, with all that it knew when it was stopped."""
        self.start("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints; empty if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout if done.returncode == 0 else ""

    def jobs(self) -> list[dict[str, str]]:
        """All jobs of the cluster, also ended ones, as `scontrol show job` has them."""
        text = self.ask("scontrol", "--oneliner", "show", "job")
        pairs = [[word.partition("=") for word in line.split()] for line in text.splitlines() if "JobId=" in line]
        return [{name: value for name, _, value in line} for line in pairs]


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a condition holds; AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited for {seconds} s in vain: {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster with idle nodes; its jobs and daemons end with it."""
    # Sockets lie in the folder, so its path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = _configured(Path(folder))
        try:
            _start(cluster)
            yield cluster
        finally:
            if "slurmctld" in cluster.daemons:
                cluster.ask("scancel", "--user", getpass.getuser())
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: not cluster.ask("squeue", "--noheader").strip(), 30, "jobs that end")
            for daemon in reversed(list(cluster.daemons)):
                cluster.stop(daemon)


def _configured(folder: Path) -> Cluster:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    with contextlib.ExitStack() as sockets:
        free = [sockets.enter_context(socket.socket()) for _ in range(1 + len(NODES))]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONFIGURATION.format(host=host, user=getpass.getuser(), folder=folder, ports=ports, nodes=NODES))
    (folder / "gres.conf").write_text("Name=gpu Type=toy File=/dev/null\n")
    # The SLURM plugin of Snakemake calls srun without SLURM_CONF, which then looks into /etc.
    srun = folder / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun", path=PATH)} "$@"\n')
    srun.chmod(0o755)
    return Cluster(folder, os.environ | {"SLURM_CONF": str(conf), "PATH": f"{srun.parent}:{PATH}"})


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    files = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
    cluster.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files.values())
    wait_for((folder / "munge.socket").exists, 20, "munged")
    cluster.start_controller()
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
        cluster.start(node, "slurmd", "-D", "-f", cluster.environment["SLURM_CONF"], "-N", node)
    states = ("sinfo", "--noheader", "--Node", "--format=%T")
    try:
        wait_for(lambda: cluster.ask(*states).split() == ["idle"] * len(NODES), 60, "idle nodes")
    except AssertionError as error:
        logs = "\n".join(path.read_text()[-1000:] for path in sorted(folder.glob("*.log")))
        raise AssertionError(f"{error}\n{logs}") from None
