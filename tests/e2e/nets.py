"""Network namespaces: nodes with networks of their own, joined by a cable or by a bad wire.

A namespace lives as long as the process that holds it, and that ends when we do, so nothing is left
behind however the tests end. Devices end with their namespaces.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

NEAR, FAR = "10.83.0.1", "10.83.0.2"
"""Addresses of the two ends."""
_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_MTU = 1500
_libc = ctypes.CDLL(None, use_errno=True)


def _set_namespace(descriptor: int) -> None:
    """Of the calling thread, and of all threads and processes that it starts from now on."""
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def skip_without_namespaces() -> None:
    try:
        done = subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("network namespaces need unshare, of util-linux")
    if done.returncode:
        pytest.skip(f"network namespaces need root and iproute2: {done.stderr.strip()}")


class Node:
    """A network namespace with a loopback device and one more that is to be added."""

    device = "mf0"

    def __init__(self) -> None:
        script = "ip link set lo up && echo ready && exec cat"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"

    @property
    def pid(self) -> int:
        return self._holder.pid

    def close(self) -> None:
        self._holder.communicate()  # closes its standard input

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and what it starts, is on this node."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_namespace(there)
            try:
                yield
            finally:
                _set_namespace(home)
        finally:
            os.close(there)
            os.close(home)

    def ip(self, *arguments: str) -> None:
        with self.entered():
            subprocess.run(["ip", *arguments], check=True)

    def up(self, address: str) -> None:
        self.ip("address", "add", f"{address}/24", "dev", self.device)
        self.ip("link", "set", self.device, "up")

    def set_link(self, state: str) -> None:
        """`up` or `down`."""
        self.ip("link", "set", self.device, state)

    def traffic(self) -> tuple[int, int]:
        """Bytes that the device has received and sent."""
        with self.entered():
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        fields = next(line.split(":")[1].split() for line in lines if line.strip().startswith(self.device + ":"))
        return int(fields[0]), int(fields[8])


def join_by_cable(near: Node, far: Node) -> None:
    near.ip("link", "add", near.device, "type", "veth", "peer", "name", far.device, "netns", str(far.pid))
    near.up(NEAR)
    far.up(FAR)


class Wire:
    """Joins two nodes through this process, which takes its time and loses some of the packets."""

    def __init__(self, near: Node, far: Node, delay_s: float, loss: float, seed: int = 1) -> None:
        self.lost = 0
        self._delay_s = delay_s
        self._loss = loss
        self._choose = random.Random(seed)
        self._ends = [_tun(near), _tun(far)]
        near.up(NEAR)
        far.up(FAR)
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="wire")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._stopped)
        self._thread.join()
        for descriptor in (self._stop, *self._ends):
            os.close(descriptor)

    def _carry(self) -> None:
        underway: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            wait = max(0.0, underway[0][0] - time.monotonic()) if underway else None
            readable, _, _ = select.select([*self._ends, self._stop], [], [], wait)
            if self._stop in readable:
                return
            now = time.monotonic()
            for descriptor in readable:
                packet = os.read(descriptor, _MTU)
                if self._choose.random() < self._loss:
                    self.lost += 1
                    continue
                number += 1
                other = self._ends[1 - self._ends.index(descriptor)]
                heapq.heappush(underway, (now + self._delay_s, number, other, packet))
            while underway and underway[0][0] <= now:
                _, _, descriptor, packet = heapq.heappop(underway)
                with suppress(OSError):  # the device is down
                    os.write(descriptor, packet)


def _tun(node: Node) -> int:
    """A new tun device on a node: what is sent through it can be read, and what is written is received."""
    with node.entered():
        try:
            descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            pytest.skip(f"a bad wire needs {_TUN}: {error.strerror}")
        request = struct.pack("16sH22x", node.device.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor
