"""Several hosts on one machine: network namespaces that are joined by a bridge.

Each host has its own network interface, IP address and host name. All hosts share the file system.
This needs root and the programs `ip` and `tc` of iproute2.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

# Runs a command with the host name $1 and the hosts file $2. `ip netns exec` has already given it a
# mount namespace of its own.
WITH_NAME = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclasses.dataclass(frozen=True)
class Network:
    """Hosts that a switch connects.

    Attributes:
        prefix: Start of the names of the network namespaces.
        hosts_file: File with the addresses and names of the hosts, as /etc/hosts.
    """

    prefix: str
    hosts_file: Path

    def name(self, host: int) -> str:
        """Return the name of a host."""
        return f"node{host}"

    def address(self, host: int) -> str:
        """Return the IP address of a host."""
        return f"10.77.0.{host + 1}"

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on a host, in the same process."""
        named = ["sh", "-c", WITH_NAME, "sh", self.name(host), str(self.hosts_file), *command]
        return ["ip", "netns", "exec", f"{self.prefix}-{host}", "unshare", "--uts", *named]

    def set_link(self, host: int, state: str) -> None:
        """Set the link between a host and the switch `up` or `down`.

        As with an unplugged cable, packets are lost without an error.
        """
        _run("ip", "-n", f"{self.prefix}-switch", "link", "set", f"port{host}", state)

    def limit_rate(self, host: int, rate: str) -> None:
        """Limit the rate at which a host sends and receives, e.g. `1mbit`."""
        limit = ("rate", rate, "burst", "32kbit", "latency", "400ms")
        for namespace, device in ((str(host), "eth0"), ("switch", f"port{host}")):
            target = (f"{self.prefix}-{namespace}", "qdisc", "replace", "dev", device, "root")
            _run("tc", "-n", *target, "tbf", *limit)


def reason_unavailable() -> str:
    """Return why network namespaces cannot be used; empty if they can."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: iproute2)"
    name = f"jaxvid{os.getpid()}-test"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces cannot be created: {done.stderr.strip()}"
    _run("ip", "netns", "delete", name)
    return ""


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Make a network; at the end, kill all of its processes and remove it.

    Args:
        count: Number of hosts.
    """
    prefix = f"jaxvid{os.getpid()}"
    switch = f"{prefix}-switch"
    namespaces = [switch, *(f"{prefix}-{host}" for host in range(count))]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        net = Network(prefix, Path(folder) / "hosts")
        lines = ["127.0.0.1 localhost"]
        lines += [f"{net.address(host)} {net.name(host)}" for host in range(count)]
        net.hosts_file.write_text("\n".join(lines) + "\n")
        for namespace in namespaces:
            _run("ip", "netns", "add", namespace)
            stack.callback(_remove, namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in range(count):
            namespace, port = f"{prefix}-{host}", f"port{host}"
            peer = ("type", "veth", "peer", "name", "eth0", "netns", namespace)
            _run("ip", "-n", switch, "link", "add", port, *peer)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            address = f"{net.address(host)}/24"
            _run("ip", "-n", namespace, "address", "add", address, "dev", "eth0")
            _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        yield net


@contextlib.contextmanager
def slowed(process: subprocess.Popen, *, share: float, period: float) -> Iterator[None]:
    """Let a process run only for a share of the time, by suspending it.

    Args:
        process: The process; its child processes are not suspended.
        share: Share of the time, e.g. 0.1 for a process that is ten times slower.
        period: Seconds between two suspensions.
    """
    done = threading.Event()

    def suspend() -> None:
        while not done.wait(share * period):
            process.send_signal(signal.SIGSTOP)
            done.wait((1 - share) * period)
            process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=suspend)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _remove(namespace: str) -> None:
    """Kill the processes of a network namespace and remove it."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for process in _run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
    _run("ip", "netns", "delete", namespace)
