"""A SLURM of one node on this machine: munge, MariaDB, slurmdbd (for sacct), slurmctld and slurmd below one folder.

For Debian's SLURM 22.05, as root, with neither systemd nor cgroups. All daemons stay in the foreground, children of
this process, and are stopped with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("munged", "mariadbd", "mariadb", "slurmdbd", "slurmctld", "slurmd", "sbatch")
USER = "root"  # of all daemons
CPUS = 2
SLURMDBD = """
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""
# cred_expire is also how long a job waits that was requeued. The plugins named are those that need no cgroups.
SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=5
UnkillableStepTimeout=180
ReturnToService=2
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={root}/munge.sock
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=n1 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A SLURM whose configuration, state and logs are below ``root`` (an absolute path of under 90 characters)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons; returns when the node can run jobs. Raises TimeoutError where one does not come up."""
        self._configure()
        self._daemon("munged", "--foreground", "--force", *self._munge_files())
        self._start_database()
        self._daemon("slurmdbd", "-D")
        self.wait_for("slurmdbd", lambda: self.call("sacctmgr", "-n", "show", "cluster") is not None)
        self.call("sacctmgr", "-i", "add", "cluster", "test")
        self._daemon("slurmctld", "-D")
        self.start_slurmd()
        self.wait_for("the node", lambda: self.call("sinfo", "-h", "-o", "%T") == "idle")

    def start_slurmd(self) -> None:
        self._daemon("slurmd", "-D", "-N", "n1")

    def stop_slurmd(self) -> None:
        """As a restart of its service does it: the jobs go on."""
        self._stop("slurmd")

    def stop(self) -> None:
        """Cancel all jobs and stop every daemon."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(TimeoutError):  # the daemons are stopped nonetheless
                self.cancel_all()
        for name in reversed(list(self._daemons)):
            self._stop(name)

    def cancel_all(self) -> None:
        self.call("scancel", "--user", USER)
        self.wait_for("the end of all jobs", lambda: self.call("squeue", "-h") in ("", None))

    def call(self, *command: str) -> str | None:
        """What a command of SLURM prints; None where it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else None

    def wait_for(self, what: str, there: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}; the daemons' logs are in {self.root}")
            time.sleep(0.2)

    def _configure(self) -> None:
        for folder in ("state", "spool", "sql"):
            (self.root / folder).mkdir(parents=True)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        facts = dict(zip(("sql_port", "dbd_port", "ctld_port", "node_port"), ports, strict=True))
        facts |= {"root": self.root, "user": USER, "host": socket.gethostname().split(".")[0], "cpus": CPUS}
        self._sql_port = facts["sql_port"]
        for name, text in (("slurmdbd.conf", SLURMDBD), ("slurm.conf", SLURM)):
            (self.root / name).write_text(text.format(**facts))
        (self.root / "munge.key").write_bytes(os.urandom(1024))
        for secret in ("slurmdbd.conf", "munge.key"):
            (self.root / secret).chmod(0o600)

    def _munge_files(self) -> list[str]:
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.root / 'munge'}.{suffix}" for option, suffix in files.items()]

    def _start_database(self) -> None:
        where = f"--socket={self.root / 'sql.sock'}"
        folder = f"--datadir={self.root / 'sql'}"
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--user={USER}", folder, "--skip-test-db"],
            check=True,
            capture_output=True,
        )
        address = ("--bind-address=127.0.0.1", f"--port={self._sql_port}")
        cheap = ("--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0")
        self._daemon("mariadbd", "--no-defaults", f"--user={USER}", folder, where, *address, *cheap)
        sql = ("mariadb", "--no-defaults", where, "-e")
        self.wait_for("MariaDB", lambda: self.call(*sql, "SELECT 1") is not None)
        account = "'slurm'@'127.0.0.1'"
        self.call(*sql, f"CREATE USER {account} IDENTIFIED BY 'slurm'; GRANT ALL ON slurm.* TO {account}")

    def _daemon(self, name: str, *options: str) -> None:
        with open(self.root / f"{name}.out", "ab") as out:
            command = [shutil.which(name) or name, *options]
            # A session of its own: Ctrl-C on the tests is for the tests, which then stop the daemons in order.
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=out, stderr=out, start_new_session=True
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
