"""READ and WRITE by pyverbs' own post and poll, from Python: what the native path is kept instead of."""

from __future__ import annotations

import importlib
from types import TracebackType
from typing import Any, Self

from memfaas.errors import FabricUnavailable
from memfaas.fabric.devices import load_pyverbs

_ACCESS = 1 | 2 | 4  # LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ
_RC = 2
_WRITE, _READ = 0, 4
_SIGNALED = 2


class Pair:
    """Two connected queue pairs of one device. Raises PyverbsMissing and FabricUnavailable."""

    def __init__(self, device: str, size: int) -> None:
        name, port, gid = device.split(":")
        library = load_pyverbs()
        part = {one: importlib.import_module(f"pyverbs.{one}") for one in ("addr", "cq", "mr", "pd", "qp", "wr")}
        self._wr = part["wr"]
        self._context = library.Context(name=name)
        self._pd = part["pd"].PD(self._context)
        self._regions = [part["mr"].MR(self._pd, size, _ACCESS) for _ in range(2)]
        self._cqs = [part["cq"].CQ(self._context, 16) for _ in range(2)]
        capacity = part["qp"].QPCap(max_send_wr=16, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        self._qps = [
            part["qp"].QP(self._pd, part["qp"].QPInitAttr(qp_type=_RC, scq=cq, rcq=cq, cap=capacity))
            for cq in self._cqs
        ]
        about = self._context.query_port(int(port))
        for near, far in ((0, 1), (1, 0)):
            attr = self._attr(part, int(port))
            attr.path_mtu = about.active_mtu
            attr.dest_qp_num = self._qps[far].qp_num
            attr.max_rd_atomic = attr.max_dest_rd_atomic = 1
            attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, 6, 6
            route = part["addr"].GlobalRoute(dgid=self._context.query_gid(int(port), int(gid)), sgid_index=int(gid))
            attr.ah_attr = part["addr"].AHAttr(gr=route, is_global=1, port_num=int(port), dlid=about.lid)
            self._qps[near].to_rts(attr)

    @staticmethod
    def _attr(part: dict[str, Any], port: int = 1) -> Any:
        attr = part["qp"].QPAttr(port_num=port)
        attr.qp_access_flags = _ACCESS
        return attr

    def run(self, read: bool, size: int) -> None:
        """Posts one, and polls until it is done. Raises FabricUnavailable."""
        near, far = self._regions
        piece = self._wr.SGE(near.buf, size, near.lkey)
        work = self._wr.SendWR(opcode=_READ if read else _WRITE, num_sge=1, sg=[piece], send_flags=_SIGNALED)
        work.set_wr_rdma(far.rkey, far.buf)
        self._qps[0].post_send(work)
        count, done = 0, []
        while not count:
            count, done = self._cqs[0].poll()
        if done[0].status:
            raise FabricUnavailable(f"verbs: pyverbs' operation ended with status {done[0].status}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in (*self._qps, *self._cqs, *self._regions, self._pd, self._context):
            one.close()
