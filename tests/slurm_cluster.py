"""A real Slurm of two pretend nodes on this machine, for tests and for trying things by hand.

    python tests/slurm_cluster.py up DIR              # starts it; DIR holds its settings, state and logs
    python tests/slurm_cluster.py run DIR sbatch ...  # any command, on the cluster's login node
    python tests/slurm_cluster.py down DIR            # ends it with all its jobs

The controller (the login node) and the nodes n1 and n2 run in namespaces of their own: processes, host name, mounts
and, where the kernel allows it, network, so that a "localhost" that should have been the head node fails as it would on
a cluster. Each node has its own /tmp and /dev/shm; everything else on disk is shared. Whatever runs inside descends
from one process, the first of its process namespace: when that dies the kernel ends the rest, and networks and mounts
go with them. So a crash leaves nothing behind, and the machine's /etc is never written.

It must be root, and installs Debian's slurm-wlm, munge and iproute2 with apt-get where they are missing.
CPUs, memory and the four GPUs of each node are made up. There is no accounting: sacct knows nothing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("slurm-wlm", "munge", "iproute2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter", "setpriv")
SETTINGS = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_")
NAMESPACES = ("--mount", "--uts", "--pid", "--fork", "--mount-proc")
NODES = ["n1", "n2"]
GPUS = 4  # of each node
PORT = 16900

# Job numbers go on from the clock: logs are named by them, and those of an earlier cluster may still be there.
# main's jobs are preempted by high's: the signal of --signal at once, SIGTERM after GraceTime seconds, then the queue.
# cred_expire is also how long a requeued job waits before it may start again (Slurm's default: two minutes).
# MinJobAge: finished jobs stay visible to squeue and scontrol, as there is no sacct.
SLURM_CONF = """\
ClusterName=tests
FirstJobId={first}
SlurmctldHost=login({address}1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MinJobAge=86400
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000,sched_interval=5,bf_interval=5
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=10 PreemptMode=REQUEUE GraceTime={grace} State=UP
PartitionName=high Nodes=ALL DefaultTime=60 PriorityTier=50 PreemptMode=OFF State=UP
"""


class Unavailable(Exception):
    """This machine cannot run the cluster, and why."""


class Cluster:
    """A cluster whose settings, state and logs are in ``folder``; ``with Cluster(folder) as cluster: ...``.

    ``shared`` are further folders below /tmp that the nodes see. ``grace`` is how many seconds a preempted job is left
    after its signal. ``own_network``: whether nodes have networks of their own; by default where that is possible.
    With ``outlive`` the cluster stays when this process ends.
    """

    def __init__(
        self,
        folder: Path,
        *,
        grace: int = 30,
        shared: tuple[Path, ...] = (),
        own_network: bool | None = None,
        outlive: bool = False,
    ) -> None:
        self.folder = folder.resolve()
        self.grace, self.shared, self.own_network, self.outlive = grace, shared, own_network, outlive
        if not re.fullmatch(r"/[\w./+-]{1,80}", str(self.folder)):
            raise Unavailable(
                f"{self.folder}: Slurm takes no special characters, a socket no path beyond 80 characters"
            )

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment without what another Slurm has put there."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
        return {**clean, "PATH": f"{clean['PATH']}:/usr/sbin:/sbin", "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when all nodes are idle. ``Unavailable`` where the machine lacks what it takes."""
        prepare()
        self.stop()
        if self.own_network is None:
            self.own_network = may_unshare("--net", "ip", "link", "add", "probe", "type", "bridge")
        self._write_settings()
        # Without setpriv's PDEATHSIG a killed pytest would leave the cluster running.
        tied = [] if self.outlive else ["setpriv", "--pdeathsig", "KILL"]
        network = ["--net"] if self.own_network else []
        command = [*tied, "unshare", *network, *NAMESPACES, "--kill-child"]
        with (self.folder / "log" / "start.log").open("w") as log:
            process = subprocess.Popen(
                [*command, sys.executable, __file__, "controller", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment,
            )
        (self.folder / "pid").write_text(str(process.pid))
        idle = ["timeout", "5", "sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N"]
        if not wait_until(lambda: self._pid() is not None and self.run(*idle).stdout.split() == NODES, 60):
            logs = "".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in (self.folder / "log").iterdir())
            self.stop()
            raise RuntimeError(f"the nodes did not come up\n{logs}")

    def stop(self) -> None:
        """End the cluster and its jobs, if it runs. What it wrote stays."""
        if self._pid() is not None:
            # The first process of a process namespace can be asked from inside; when it is gone, all of them are.
            self.run("kill", "1")
            if not wait_until(lambda: self._pid() is None, 10):
                raise RuntimeError(f"the cluster in {self.folder} does not end")
        (self.folder / "pid").unlink(missing_ok=True)

    def command(self, *parts: object) -> list[str]:
        """What runs ``parts`` on the login node, in the current folder; give it ``environment``."""
        pid = self._pid()
        if pid is None:
            raise RuntimeError(f"no cluster runs in {self.folder}")
        enter = ["nsenter", f"--target={pid}", "--mount", "--uts", "--net", f"--pid=/proc/{pid}/ns/pid_for_children"]
        return [*enter, "env", f"--chdir={Path.cwd()}", *map(str, parts)]

    def run(self, *parts: object, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """``parts`` on the login node, to the end; ``environment`` are further variables."""
        return subprocess.run(
            self.command(*parts),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**self.environment, **environment},
        )

    def submit(self, *parts: object, **environment: str) -> str:
        """``sbatch parts``: the job's id."""
        done = self.run("sbatch", "--parsable", *parts, **environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, ExitCode, Restarts, NodeList, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, number: str, *states: str, seconds: float = 400) -> dict[str, str]:
        """The job, once it is in one of the ``states`` (without: once it is over)."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        if not wait_until(lambda: self.job(number)["JobState"] in states, seconds):
            raise TimeoutError(f"job {number} is not {' or '.join(states)} after {seconds} s:\n{self.job(number)}")
        return self.job(number)

    def _pid(self) -> int | None:
        """The process that holds the cluster's namespaces, as long as it lives."""
        try:
            pid = int((self.folder / "pid").read_text())
            alive = str(self.folder) in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            return None
        return pid if alive else None

    def _below_tmp(self) -> list[str]:
        needed = (self.folder, ROOT, Path(sys.prefix).resolve(), *(path.resolve() for path in self.shared))
        return [str(path) for path in needed if path.is_relative_to("/tmp")]

    def _write_settings(self) -> None:
        for name in ("log", "state", "spool", "gpus"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        address = "10.78.0." if self.own_network else "127.0.78."
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr={address}{11 + i} Port={PORT + 1 + i} CPUs=16 "
            f"RealMemory=512000 Gres=gpu:{GPUS} State=UNKNOWN"
            for i, name in enumerate(NODES)
        ]
        layout = {"own_network": self.own_network, "shared": self._below_tmp()}
        (self.folder / "cluster.json").write_text(json.dumps(layout))
        self.conf.write_text(
            SLURM_CONF.format(
                address=address,
                port=PORT,
                folder=self.folder,
                first=int(time.time()) % 10**7,
                nodes="\n".join(lines),
                grace=self.grace,
            )
        )
        # Slurm wants character devices, and takes the digits for CUDA_VISIBLE_DEVICES.
        for i in range(GPUS):
            (self.folder / "gpus" / f"nvidia{i}").symlink_to("/dev/null")
        names = f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpus/nvidia[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(names)
        # Nothing uses it, but finding out by itself which version a host has fails on some.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = ["127.0.0.1 localhost", f"{address}1 login"]
        hosts += [f"{address}{11 + i} {name}" for i, name in enumerate(NODES)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        # No name server answers inside: every look-up of an unknown name would hang for ten seconds.
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        key = self.folder / "munge.key"
        key.unlink(missing_ok=True)
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.folder.chmod(0o755)


def prepare() -> None:
    """Install what is missing; ``Unavailable`` says what this machine does not allow."""
    if os.geteuid() != 0:
        raise Unavailable("starting Slurm daemons takes root")
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        if shutil.which("apt-get") is None:
            raise Unavailable(f"there is no {', '.join(missing)}, and no apt-get to install it with")
        print(f"installing {' '.join(PACKAGES)} with apt-get", file=sys.stderr, flush=True)
        for step in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", *step],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
            if done.returncode:
                raise Unavailable(f"apt-get {step[0]} failed: {done.stderr.strip()[-300:]}")
    if not may_unshare("hostname", "n1"):
        raise Unavailable("this kernel or container does not allow namespaces (a privileged one would)")


def may_unshare(*command: str) -> bool:
    """Whether ``command`` (after further flags of unshare) succeeds in namespaces of its own."""
    return subprocess.run(["unshare", *NAMESPACES, *command], capture_output=True, check=False).returncode == 0


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether ``true`` came to hold within ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def do(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def private_names(folder: Path, hostname: str) -> None:
    """A host name and an /etc/hosts for this mount and host name namespace alone."""
    do("mount", "--bind", folder / "hosts", "/etc/hosts")
    do("mount", "--bind", folder / "nsswitch.conf", "/etc/nsswitch.conf")
    do("hostname", hostname)


def controller(folder: Path) -> None:
    """The first process of the cluster's process namespace: the login node, with munged, slurmctld and the nodes."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    layout = json.loads((folder / "cluster.json").read_text())
    private_names(folder, "login")
    if layout["own_network"]:
        do("ip", "link", "set", "lo", "up")
        do("ip", "link", "add", "switch", "type", "bridge")
        do("ip", "address", "add", "10.78.0.1/24", "dev", "switch")
        do("ip", "link", "set", "switch", "up")
    munge = [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/munged.seed"]
    subprocess.Popen(["munged", "--foreground", "--force", *munge])
    wait_until((folder / "munge.sock").exists, 10)
    subprocess.Popen(["slurmctld", "-D", "-c"])
    # A slurmd that finds no controller asks again only after a while.
    wait_until(lambda: subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode == 0, 10)
    flags = ["--mount", "--uts", *(["--net"] if layout["own_network"] else [])]
    for name in NODES:
        subprocess.Popen(["unshare", *flags, sys.executable, __file__, "node", str(folder), name])
    while True:  # it inherits every orphan of the namespace, and lives until it is killed
        try:
            os.wait()
        except ChildProcessError:
            return


def node(folder: Path, name: str) -> None:
    """One node, in namespaces of its own, with a cable to the login node's switch; becomes its slurmd."""
    layout = json.loads((folder / "cluster.json").read_text())
    private_names(folder, name)
    if layout["own_network"]:
        do("ip", "link", "set", "lo", "up")
        do("ip", "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", 1)
        do("ip", "address", "add", f"10.78.0.{11 + NODES.index(name)}/24", "dev", "eth0")
        do("ip", "link", "set", "eth0", "up")
        do("nsenter", "--target=1", "--net", "ip", "link", "set", name, "master", "switch", "up")
    do("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    tmp = folder / "spool" / f"tmp-{name}"
    tmp.mkdir()
    do("mount", "-t", "tmpfs", "tmpfs", tmp)
    for path in layout["shared"]:
        inside = tmp / Path(path).relative_to("/tmp")
        inside.mkdir(parents=True, exist_ok=True)
        do("mount", "--bind", path, inside)
    do("mount", "--rbind", tmp, "/tmp")
    (folder / "spool" / name).mkdir()
    os.execvp("slurmd", ["slurmd", "-D", "-N", name])


def main() -> int:
    """The commands above; ``controller`` and ``node`` are what the cluster starts itself with."""
    match sys.argv[1:]:
        case ["up", folder]:
            Cluster(Path(folder), outlive=True).start()
            print(f"2 nodes idle. Next: python {sys.argv[0]} run {folder} sinfo")
        case ["down", folder]:
            Cluster(Path(folder)).stop()
        case ["run", folder, *command] if command:
            cluster = Cluster(Path(folder))
            return subprocess.run(cluster.command(*command), check=False, env=cluster.environment).returncode
        case ["controller", folder]:
            controller(Path(folder))
        case ["node", folder, name]:
            node(Path(folder), name)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
