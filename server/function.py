"""A memory function: one process that serves one lease's memory.

It starts idle, and becomes the function of a lease when its agent sends it the lease's descriptors:
data and control memory, and two listening sockets. The agent keeps those too. So when a function is
killed another takes its place on the same memory, and when the agent is killed the function goes on,
until a new agent adopts it through its own control socket and gets the descriptors back.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
from pathlib import Path

import trio

from memfaas import rpc
from memfaas.errors import LeaseLost, ProtocolError, TransportError
from memfaas.messages import (
    Adopt,
    Done,
    FunctionReport,
    InDoubt,
    Message,
    Punch,
    Punched,
    Received,
    Resume,
    Send,
    Sent,
    Serve,
    Serving,
    Stop,
    Unpunch,
)
from memfaas.server import process
from memfaas.server.fds import FdStream, peer_of
from memfaas.server.serving import DESCRIPTORS, REMOTE, Served

ORPHAN_LIFE_S = 300.0
"""How long a function waits for a new agent before it gives its memory back and ends."""
_LEAVE_S = 5.0
_REPORT_PAUSE_S = 0.1
_REMOTE_CHECK_S = 5.0
"""Native threads end by themselves when their clients hang up; so often it is looked for."""

logger = logging.getLogger(__name__)


def control_path(unix_path: str) -> Path:
    """Where the function behind a lease's Unix socket listens for a new agent."""
    return Path(unix_path).with_suffix(".ctl")


def main(sock: socket.socket) -> None:
    """Runs a function at the other end of its agent's socket, until it is told to stop."""
    os.umask(0o177)  # its control socket is for its own user alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which will tell us
    process.allow_many_files()
    process.allow_locked_memory()
    _call_oneself("memfaas-idle")
    trio.run(_run, sock)


async def _run(sock: socket.socket) -> None:
    async with trio.open_nursery() as nursery:
        sock.setblocking(False)
        await Function(nursery).serve_agent(FdStream(trio.socket.from_stdlib_socket(sock)), adopts=False)


class Function:
    """Serves at most one lease in its life."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._served: Served | None = None
        self._agent: rpc.Channel | None = None
        self._obeys = trio.Event()
        self._changed = trio.Event()
        self._ended = False

    async def serve_agent(self, stream: FdStream, *, adopts: bool) -> None:
        """Serves a connection to an agent, which is obeyed at once, or else when it `adopts` us."""
        peer = _AgentPeer(self, stream)
        if not adopts:
            self.obey(peer.channel)
        try:
            await peer.channel.run()
        except ProtocolError as error:
            logger.error("%s", error)
        if self._agent is peer.channel:
            self._agent = None
            await self._without_agent()

    def obey(self, agent: rpc.Channel) -> None:
        """Only one agent runs in a donor's folder, so an earlier one is dead."""
        previous, self._agent = self._agent, agent
        self._obeys.set()
        self._changed.set()
        if previous is not None:
            self._nursery.start_soon(previous.aclose)

    async def _without_agent(self) -> None:
        if self._served is not None and not self._ended:
            logger.info("lease %s: the agent is gone, serving on", self._served.name)
            self._obeys = trio.Event()
            with trio.move_on_after(ORPHAN_LIFE_S):
                await self._obeys.wait()
                return
            logger.warning("lease %s: no agent for %g s, so it ends", self._served.name, ORPHAN_LIFE_S)
            await self._end_alone(self._served)
        self._nursery.cancel_scope.cancel()

    async def _end_alone(self, served: Served) -> None:
        """There is no agent that would clear up behind us."""
        self._ended = True
        await served.give_back()
        _unlink(served.message.endpoint.unix_path)
        self._nursery.cancel_scope.cancel()

    async def serve(self, message: Serve, descriptors: list[int]) -> None:
        """Becomes the function of a lease. Raises LeaseLost when its memory makes no sense."""
        if self._served is not None:
            raise ProtocolError("this function serves a lease already")
        served = Served(message, descriptors, lambda: self._changed.set(), self._received)
        await served.prepare()
        _call_oneself(f"mf-{served.name}")
        control = _listen(control_path(message.endpoint.unix_path))
        self._served = served
        self._nursery.start_soon(self._run, served)
        self._nursery.start_soon(self._accept_agents, control)
        self._nursery.start_soon(self._report, served)

    async def _run(self, served: Served) -> None:
        try:
            await served.run()
        except LeaseLost as error:
            logger.warning("%s", error)
            self._nursery.cancel_scope.cancel()  # its agent takes the memory back

    def the_lease(self) -> Served:
        """Raises ProtocolError when there is none, and LeaseLost when its memory is being given back."""
        if self._served is None:
            raise ProtocolError("this function serves no lease")
        if self._ended:
            raise LeaseLost(f"lease {self._served.name} is over, and its memory is being given back")
        return self._served

    def _received(self) -> None:
        self._nursery.start_soon(self._tell, Received())

    async def _tell(self, message: Message) -> None:
        if self._agent is not None:
            try:
                await self._agent.notify(message)
            except TransportError:
                pass  # a new agent asks

    async def send(self, message: Send) -> Sent:
        """Comes to its end even if the agent that asked is killed; then the next one is told, or nobody need be."""
        served, asked_by = self.the_lease(), self._agent

        async def work() -> Sent:
            sent = await served.send(message.target, message.timeout)
            if self._agent is not asked_by or asked_by is None or asked_by.closed:
                if sent.outcome == "moved":
                    await self._end_alone(served)
                elif sent.outcome == "in doubt":
                    await self._tell(InDoubt(target=message.target))
            return sent

        return await process.detached(self._nursery, work)

    def serving(self) -> tuple[Serving, list[int]]:
        """What a new agent has to know, and the descriptors that it needs."""
        served = self.the_lease()
        message = served.message
        answer = Serving(
            spec=message.spec,
            endpoint=message.endpoint,
            arriving=served.arriving,
            in_doubt=served.in_doubt,
        )
        return answer, served.descriptors

    async def stop(self) -> None:
        self._ended = True
        if self._served is not None:
            await self._served.give_back()
        self._nursery.start_soon(self._leave)

    async def _leave(self) -> None:
        await trio.sleep(_LEAVE_S)  # the agent hangs up before, when it has our answer
        self._nursery.cancel_scope.cancel()

    async def _accept_agents(self, control: socket.socket) -> None:
        path = control.getsockname()
        try:
            await trio.serve_listeners(self._on_agent, [trio.SocketListener(trio.socket.from_stdlib_socket(control))])
        finally:
            _unlink(path)

    async def _on_agent(self, stream: trio.SocketStream) -> None:
        _, uid = peer_of(stream.socket)
        if uid in (0, os.getuid()):
            await self.serve_agent(FdStream(stream.socket), adopts=True)

    async def _report(self, served: Served) -> None:
        """Tells the agent what changed, and a new agent everything."""
        told: tuple[rpc.Channel, FunctionReport] | None = None
        while True:
            # What was told last counts too: its connections may all have ended meanwhile.
            told_remote = told is not None and not told[1].links.keys().isdisjoint(REMOTE)
            with trio.move_on_after(_REMOTE_CHECK_S if told_remote or served.has_remote_links() else math.inf):
                await self._changed.wait()
            self._changed = trio.Event()
            report = served.report()
            if self._agent is not None and (self._agent, report) != told:
                told = (self._agent, report)
                try:
                    await self._agent.notify(report)
                except TransportError:
                    pass
            await trio.sleep(_REPORT_PAUSE_S)


def _call_oneself(name: str) -> None:
    """For `top` and the like: else all functions look like the zygote."""
    Path("/proc/self/comm").write_text(name)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    _unlink(str(path))  # a killed function left it
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    sock.setblocking(False)
    return sock


class _AgentPeer:
    """What an agent may ask."""

    def __init__(self, function: Function, stream: FdStream) -> None:
        self.channel = rpc.Channel(stream, self, "the agent")
        self._function = function
        self._stream = stream

    async def on_request(self, message: Message) -> Message:
        match message:
            case Serve():
                await self._function.serve(message, self._take(DESCRIPTORS))
                return Done()
            case Adopt():
                (log,) = self._take(1)
                os.dup2(log, 2)  # the old agent's log is closed, or soon will be
                os.close(log)
                answer, descriptors = self._function.serving()
                self._function.obey(self.channel)
                self._stream.attach(descriptors)
                return answer
            case Send():
                return await self._function.send(message)
            case Resume():
                await self._function.the_lease().resume(message.epoch)
                return Done()
            case Punch():
                return Punched(size=await self._function.the_lease().punch(message.size))
            case Unpunch():
                await self._function.the_lease().unpunch()
                return Done()
            case Stop():
                await self._function.stop()
                return Done()
        raise ProtocolError(f"a function does not answer {type(message).__name__}")

    def _take(self, count: int) -> list[int]:
        try:
            return self._stream.take(count)
        except ValueError as error:
            raise ProtocolError(str(error)) from None

    def on_notice(self, message: Message) -> None:
        raise ProtocolError(f"a function is told no {type(message).__name__}")
