# cython: language_level=3, boundscheck=False, wraparound=False, binding=False
"""Python's face of memfaas/native: see _native.pyi for what each thing does.

The fast path of an operation on mapped memory runs with the GIL held and never waits: it is shorter
than letting the GIL go. Whatever copies much or may wait runs without the GIL.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.errno cimport EINVAL, EMFILE, ENOMEM, EPERM, ETIMEDOUT
from libc.string cimport memcpy, memset

import logging
import os

from memfaas.errors import (
    DeadlineExceeded,
    FabricUnavailable,
    KeyAbsent,
    ProtocolError,
    StoreFull,
    TransportError,
    UsageError,
    ValueCorrupt,
    ValueTooLarge,
)

log = logging.getLogger(__name__)

MAX_KEY = MF_MAX_KEY
MAX_META = MF_MAX_META
MIN_SHARD = MF_MIN_SHARD
USER = 0
PART = 1
FLAG_LZ4 = 1
FLAG_MANIFEST = MF_MANIFEST
FLAG_ARRAY = 4
TAG_BYTES = MF_TAG
NEED_CONNECTION = MF_NEED_CONNECTION
BROKEN = MF_BROKEN
REVOKED = MF_REVOKED
FROZEN = MF_FROZEN
STALE = MF_STALE


cdef int kind_of(object kind) except -1:
    if kind == "shard":
        return MF_SHARD
    if kind == "region":
        return MF_REGION
    raise UsageError(f"kind of memory {kind!r}: expected 'shard' or 'region'")


def geometry(kind, uint64_t size):
    cdef mf_header header
    mf_geometry(kind_of(kind), size, &header)
    return header.data_bytes, header.control_bytes


def part_size(uint64_t shard_size):
    cdef mf_header header
    mf_geometry(MF_SHARD, shard_size, &header)
    return header.part_size


def format_memory(int data_fd, int control_fd, *, kind, uint64_t size, bytes lease, bytes store, uint64_t shard,
                  uint64_t epoch, bint arriving=False):
    cdef mf_header header
    cdef int error
    if len(lease) != 16 or len(store) != 16:
        raise UsageError("lease and store are 16 bytes each")
    mf_geometry(kind_of(kind), size, &header)
    memcpy(header.lease, PyBytes_AS_STRING(lease), 16)
    memcpy(header.store, PyBytes_AS_STRING(store), 16)
    header.shard = shard
    header.epoch = epoch
    with nogil:
        error = mf_format(data_fd, control_fd, &header, MF_STATE_FROZEN if arriving else MF_STATE_SERVING)
    if error:
        raise OSError(error, os.strerror(error))


# --- the owner's side -----------------------------------------------------------------------------


STATES = {MF_STATE_SERVING: "serving", MF_STATE_FROZEN: "frozen", MF_STATE_REVOKED: "revoked"}


cdef class Memory:
    cdef mf_memory memory
    cdef bint mapped

    def __init__(self, int data_fd, int control_fd):
        cdef int error = mf_map(&self.memory, data_fd, control_fd, 0)
        if error == EINVAL:
            raise ValueError("these descriptors do not hold a memory of this version of memfaas")
        if error:
            raise OSError(error, os.strerror(error))
        self.mapped = True

    def __dealloc__(self):
        if self.mapped:
            mf_unmap(&self.memory)

    cdef int check(self) except -1:
        if not self.mapped:
            raise ValueError("this memory is closed")
        return 0

    @property
    def kind(self):
        return "shard" if self.memory.at.kind == MF_SHARD else "region"

    @property
    def size(self):
        return self.memory.at.size

    @property
    def lease(self):
        return PyBytes_FromStringAndSize(<char *>self.memory.at.lease, 16)

    @property
    def epoch(self):
        return self.memory.at.epoch

    @property
    def data_bytes(self):
        return self.memory.at.data_bytes

    @property
    def part_size(self):
        return self.memory.at.part_size

    def populate(self, size_t limit):
        cdef int error
        self.check()
        with nogil:
            error = mf_populate(&self.memory, limit)
        if error == EPERM:
            raise PermissionError(error, "the system does not let us lock this memory (RLIMIT_MEMLOCK)")
        if error == ENOMEM:
            raise MemoryError("the system has no memory to back the lease with")
        if error:
            raise OSError(error, os.strerror(error))
        return self.memory.populated

    def revoke(self):
        self.check()
        return STATES.get(mf_revoke(&self.memory), "revoked")

    def registered(self):
        self.check()
        return self.memory.control.registered != 0

    @property
    def state(self):
        self.check()
        return STATES.get(self.memory.control.state, "revoked")

    def thaw(self):
        self.check()
        return mf_thaw(&self.memory)

    def freeze(self):
        self.check()
        return mf_freeze(&self.memory)

    def drain(self, double timeout_s):
        cdef bint drained
        cdef int64_t timeout_ns = <int64_t>(timeout_s * 1e9)
        self.check()
        with nogil:
            drained = mf_drain(&self.memory, mf_now() + timeout_ns)
        return drained

    def set_epoch(self, uint64_t epoch):
        self.check()
        mf_set_epoch(&self.memory, epoch)

    def operations(self):
        self.check()
        return mf_operations(&self.memory)

    def copy_all(self):
        self.check()
        mf_copy_all(&self.memory)

    def copy_written(self, int fd, double timeout_s, double patience_s=0.0):
        cdef mf_copy copy = [fd, mf_now() + <int64_t>(timeout_s * 1e9), 0, False, <int64_t>(patience_s * 1e9)]
        cdef int error
        self.check()
        with nogil:
            error = mf_copy_written(&self.memory, &copy)
        if error:
            raise OSError(error, os.strerror(error))
        return copy.bytes

    def copy_rest(self, int fd, double timeout_s, double patience_s=0.0):
        cdef mf_copy copy = [fd, mf_now() + <int64_t>(timeout_s * 1e9), 0, False, <int64_t>(patience_s * 1e9)]
        cdef int error
        self.check()
        with nogil:
            error = mf_copy_rest(&self.memory, &copy)
        if error:
            raise OSError(error, os.strerror(error))
        return copy.bytes

    def receive(self, int fd, int data_fd, double timeout_s, bint spill=False):
        cdef mf_copy copy = [fd, mf_now() + <int64_t>(timeout_s * 1e9), 0, spill, 0]
        cdef int error
        self.check()
        with nogil:
            error = mf_receive(&self.memory, &copy, data_fd)
        if error:
            raise OSError(error, os.strerror(error))
        return copy.bytes

    def may_punch(self, double timeout_s):
        cdef int64_t timeout_ns = <int64_t>(timeout_s * 1e9)
        cdef bint may
        self.check()
        with nogil:
            may = mf_may_punch(&self.memory, mf_now() + timeout_ns)
        return may

    def punch(self, int data_fd, uint64_t limit, double timeout_s):
        cdef uint64_t freed
        cdef int64_t timeout_ns = <int64_t>(timeout_s * 1e9)
        self.check()
        with nogil:
            freed = mf_punch(&self.memory, data_fd, limit, mf_now() + timeout_ns)
        return freed

    def unpunch(self, int data_fd=-1):
        cdef int error
        self.check()
        with nogil:
            error = mf_unpunch(&self.memory, data_fd)
        if error:
            raise OSError(error, os.strerror(error))

    def punched(self):
        self.check()
        return mf_punched(&self.memory)

    def attach(self, uint32_t pid, uint64_t start_time):
        cdef uint32_t participant
        self.check()
        cdef int error = mf_attach(&self.memory, pid, start_time, &participant)
        if error:
            raise OSError(error, os.strerror(error))
        return participant

    def reap(self, uint32_t participant):
        self.check()
        if participant >= MF_PARTICIPANTS:
            raise ValueError(f"no such participant: {participant}")
        with nogil:
            mf_reap(&self.memory, participant)

    def put_right(self, double timeout_s):
        cdef int error
        cdef int64_t timeout_ns = <int64_t>(timeout_s * 1e9)
        self.check()
        with nogil:
            error = mf_put_right(&self.memory, mf_now() + timeout_ns)
        if error and error != ETIMEDOUT:
            raise OSError(error, os.strerror(error))
        return error == 0

    def participants(self):
        self.check()
        cdef mf_participant *all = self.memory.control.participants
        return [(i, all[i].pid, all[i].start_time) for i in range(1, MF_PARTICIPANTS) if all[i].state]

    def stats(self):
        cdef mf_stats_t stats
        cdef int status
        self.check()
        with nogil:
            status = mf_stats_of(&self.memory, &stats)
        if status != MF_OK:
            raise OSError("the memory is revoked")
        return stats

    def close(self):
        if self.mapped:
            self.mapped = False
            mf_unmap(&self.memory)


# What is collected with others must still have its memory, its server or its link when it ends.
@cython.no_gc_clear
cdef class Server:
    cdef Memory memory
    cdef mf_server *server

    def __init__(self, Memory memory):
        memory.check()
        self.memory = memory
        self.server = mf_server_new(&memory.memory)
        if self.server is NULL:
            raise MemoryError

    def serve(self, int fd, ServerEnd end=None):
        cdef mf_end *taken = NULL if end is None else end.take()
        cdef int error
        with nogil:
            error = mf_server_serve(self.server, fd, taken)
        if error:
            os.close(fd)
            raise OSError(error, os.strerror(error))

    def connections(self):
        return mf_server_connections(self.server)

    def verbs_end(self, bytes device, bytes address):
        cdef ServerEnd end = ServerEnd.__new__(ServerEnd)
        cdef mf_welcome welcome
        cdef char why[MF_WHY]
        cdef const char *name = PyBytes_AS_STRING(device)
        cdef const mf_address *peer = <const mf_address *>PyBytes_AS_STRING(address)
        if PyBytes_GET_SIZE(address) != sizeof(mf_address):
            raise ProtocolError("a malformed address of a queue pair")
        with nogil:
            end.end = mf_end_new(self.server, name, peer, &welcome, why)
        if end.end is NULL:
            raise FabricUnavailable(f"verbs: {text_of(why)}")
        end.server = self
        end.welcome = PyBytes_FromStringAndSize(<char *>&welcome, sizeof(welcome))
        return end

    def verbs_connections(self):
        return mf_verbs_connections(self.server)

    def close_verbs(self, str why):
        cdef bytes text = why.encode()
        cdef const char *reason = PyBytes_AS_STRING(text)
        with nogil:
            mf_verbs_close(self.server, reason)

    def open_verbs(self):
        with nogil:
            mf_verbs_reopen(self.server)

    def begin_registering(self):
        cdef bint begins
        with nogil:
            begins = mf_verbs_ahead_begin(self.server)
        return begins

    def register_more(self):
        cdef char why[MF_WHY]
        cdef int status
        with nogil:
            status = mf_verbs_ahead(self.server, why)
        if status == MF_BROKEN:
            raise FabricUnavailable(f"verbs: {text_of(why)}")
        return status == MF_OK

    def cut(self):
        mf_server_cut(self.server)

    def stop(self, double timeout_s):
        cdef bint ended
        cdef int64_t timeout_ns = <int64_t>(timeout_s * 1e9)
        with nogil:
            ended = mf_server_stop(self.server, timeout_ns)
        return ended

    def __dealloc__(self):
        # A thread that has not ended still uses it; then the process is about to end anyway.
        if self.server is not NULL and mf_server_stop(self.server, 0):
            mf_server_free(self.server)


@cython.no_gc_clear
cdef class ServerEnd:
    cdef mf_end *end
    cdef Server server
    cdef readonly bytes welcome

    cdef mf_end *take(self) except NULL:
        cdef mf_end *end = self.end
        if end is NULL:
            raise ValueError("this end serves a connection already")
        self.end = NULL
        return end

    def __dealloc__(self):
        if self.end is not NULL:
            with nogil:
                mf_end_free(self.end)


cdef str text_of(const char *why):
    return why.decode("utf-8", "replace")


# --- links ------------------------------------------------------------------------------------------


cdef class Link:
    cdef mf_link link
    cdef object __weakref__

    def close(self):
        # What other threads are doing right now goes on; the mapping goes with the last reference.
        self.link.closed = True
        if self.link.pool is not NULL:
            mf_pool_close(self.link.pool)

    def stats(self):
        cdef mf_stats_t stats
        cdef int status
        with nogil:
            status = mf_link_stats(&self.link, &stats)
        if status != MF_OK:
            raise LinkDown(status)
        return stats

    cdef int note_copies(self) except -1:
        """After something large: a device that does not take the caller's memory is no secret."""
        return 0

    def __dealloc__(self):
        if self.link.pool is not NULL:
            mf_pool_free(self.link.pool)
        if self.link.remote is not NULL:
            mf_remote_free(self.link.remote)
        if self.link.fabric == MF_SHM:
            mf_unmap(&self.link.memory)


class LinkDown(Exception):
    """A link can't serve right now; `args[0]` is the reason, as in `StoreCore._repair`."""


cdef class ShmLink(Link):
    fabric = "shm"

    def __init__(self, int data_fd, int control_fd, uint32_t participant, double timeout_s):
        cdef int error = mf_map(&self.link.memory, data_fd, control_fd, participant)
        if error == EINVAL:
            raise ProtocolError("what the memory function sent is not a memory of this version of memfaas")
        if error:
            raise OSError(error, os.strerror(error))
        self.link.fabric = MF_SHM
        self.link.timeout = <int64_t>(timeout_s * 1e9)


cdef class TcpLink(Link):
    fabric = "tcp"

    def __init__(self, double timeout_s):
        self.link.fabric = MF_TCP
        self.link.timeout = <int64_t>(timeout_s * 1e9)
        self.link.pool = mf_pool_new(self.link.timeout)
        if self.link.pool is NULL:
            raise MemoryError

    def add(self, int fd):
        if mf_pool_add(self.link.pool, fd, NULL):
            os.close(fd)
            raise MemoryError


cdef class VerbsLink(Link):
    fabric = "verbs"
    cdef bint told

    def __init__(self, bytes device, double timeout_s):
        cdef char why[MF_WHY]
        cdef const char *name = PyBytes_AS_STRING(device)
        why[0] = 0
        self.link.fabric = MF_VERBS
        self.link.timeout = <int64_t>(timeout_s * 1e9)
        with nogil:
            self.link.remote = mf_remote_new(name, why)
        if self.link.remote is NULL:
            raise FabricUnavailable(f"verbs: {text_of(why)}")
        self.link.pool = mf_pool_new(self.link.timeout)
        if self.link.pool is NULL:
            raise MemoryError

    def queue_pair(self):
        cdef QueuePair pair = QueuePair.__new__(QueuePair)
        cdef mf_address address
        cdef char why[MF_WHY]
        with nogil:
            pair.queue = mf_queue_new(self.link.remote, &address, why)
        if pair.queue is NULL:
            raise FabricUnavailable(f"verbs: {text_of(why)}")
        pair.link = self
        pair.address = PyBytes_FromStringAndSize(<char *>&address, sizeof(address))
        return pair

    def add(self, int fd, QueuePair pair, bytes welcome, double timeout_s):
        cdef mf_queue *queue = pair.queue
        cdef const mf_welcome *said = <const mf_welcome *>PyBytes_AS_STRING(welcome)
        cdef char why[MF_WHY]
        cdef int64_t patience = <int64_t>(timeout_s * 1e9)
        cdef int error
        if pair.link is not self or queue is NULL:
            raise ValueError("this queue pair is not of this link, or is in use")
        if PyBytes_GET_SIZE(welcome) != sizeof(mf_welcome):
            raise ProtocolError("a malformed welcome to a queue pair")
        with nogil:
            error = mf_queue_connect(queue, said, why)
        if error:
            raise FabricUnavailable(f"verbs: {text_of(why)}")
        with nogil:
            error = mf_queue_test(queue, fd, mf_now() + patience)
        if error == MF_TIMEOUT or error == MF_BROKEN:
            raise FabricUnavailable("verbs: the memory function's device does not answer ours; are they on one network?")
        if error:
            raise FabricUnavailable("verbs: what the memory function's device gives is not the lease's memory")
        if mf_pool_add(self.link.pool, fd, queue):
            raise MemoryError
        pair.queue = NULL

    cdef int note_copies(self) except -1:
        if self.told or not self.link.remote.refused:
            return 0
        self.told = True
        log.warning(
            "verbs: device %s does not take the program's own memory (%s%s), so large values are copied on their way",
            self.link.remote.device.name.decode("utf-8", "replace"),
            os.strerror(self.link.remote.refusal),
            "; is `ulimit -l` too low?" if self.link.remote.refusal == ENOMEM else "",
        )
        return 0


@cython.no_gc_clear
cdef class QueuePair:
    cdef mf_queue *queue
    cdef VerbsLink link
    cdef readonly bytes address

    def __dealloc__(self):
        if self.queue is not NULL:
            with nogil:
                mf_queue_free(self.queue)


# --- a store ------------------------------------------------------------------------------------------


cdef int key_bytes(object key, const char **data, Py_ssize_t *length) except -1:
    if isinstance(key, str):
        try:
            data[0] = PyUnicode_AsUTF8AndSize(key, length)
        except UnicodeEncodeError:
            raise UsageError(f"key {shown(key)}: not valid Unicode") from None
    elif isinstance(key, bytes):
        data[0] = PyBytes_AS_STRING(key)
        length[0] = PyBytes_GET_SIZE(key)
    else:
        raise UsageError(f"a key is str or bytes, not {type(key).__name__}")
    if length[0] > MF_MAX_KEY:
        raise ValueTooLarge(f"key {shown(key)}: {length[0]} bytes, at most {MF_MAX_KEY} are allowed")
    return 0


def as_key(key):
    cdef const char *data
    cdef Py_ssize_t length
    key_bytes(key, &data, &length)
    return PyBytes_FromStringAndSize(data, length)


def shown(key):
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(key)} long)"


cdef class StoreCore:
    cdef list links
    cdef list ids  # 64-bit, from the shards' identities
    cdef readonly uint64_t part_size
    cdef bint plain

    def __init__(self, list shard_ids, uint64_t part_size, bint plain):
        if not shard_ids:
            raise UsageError("a store has at least one shard")
        self.links = [None] * len(shard_ids)
        self.ids = [mf_hash(PyBytes_AS_STRING(i), 16, 0) for i in shard_ids]
        self.part_size = part_size
        self.plain = plain

    def _set_link(self, Py_ssize_t shard, Link link):
        if not 0 <= shard < len(self.links):
            raise IndexError(shard)
        self.links[shard] = link

    def _get_link(self, Py_ssize_t shard):
        if not 0 <= shard < len(self.links):
            raise IndexError(shard)
        return self.links[shard]

    def _shard_of(self, bytes key, int space):
        return self.pick(PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space)

    cdef Py_ssize_t pick(self, const char *key, Py_ssize_t length, int space):
        # Rendezvous hashing (Thaler and Ravishankar 1996).
        cdef Py_ssize_t i, best = 0, n = len(self.links)
        cdef uint64_t hash_, score, highest = 0
        if n == 1:
            return 0
        hash_ = mf_hash_key(key, length, space)
        for i in range(n):
            score = (hash_ ^ <uint64_t>self.ids[i]) * <uint64_t>0x9e3779b97f4a7c15
            score = (score ^ (score >> 32)) * <uint64_t>0xd6e8feb86659fd93
            score ^= score >> 32
            if score >= highest:
                highest = score
                best = i
        return best

    cdef int mend(self, Py_ssize_t shard, int status, attempts_t *attempts, object key) except -1:
        """The operation did not succeed: raise, or make a further attempt sensible."""
        if status == MF_FULL:
            raise StoreFull(f"key {shown(key)}: its shard has no room; delete keys, or make the store larger")
        if status == MF_TOO_LARGE:
            raise ValueTooLarge(f"key {shown(key)}: the value is larger than the shard takes")
        if status == MF_TIMEOUT:
            raise DeadlineExceeded(f"key {shown(key)}: the shard did not answer in time")
        if status == MF_BAD:
            raise ProtocolError(f"key {shown(key)}: the memory function refused the request")
        if status == MF_CHANGED:
            attempts.changed += 1
        elif status == MF_CORRUPT:
            attempts.corrupt += 1
            if attempts.corrupt == 3:
                raise ValueCorrupt(f"key {shown(key)}: the stored bytes do not match their checksum; put it again")
        else:
            attempts.repairs += 1
            self._repair(shard, status, attempts.repairs)
        return 0

    # Rare paths: the subclass's.
    def _repair(self, shard, reason, attempt):
        raise NotImplementedError

    def _unpack(self, key, value, meta, flags):
        raise NotImplementedError

    def _get_into_rare(self, key, buffer):
        raise NotImplementedError

    def _put_rare(self, key, value):
        raise NotImplementedError

    def _forget(self, manifest):
        raise NotImplementedError

    # --- get

    cdef bytes fetch(self, object key, const char *k, Py_ssize_t n, int space, found_t *found):
        """The value as it is stored, or None."""
        cdef mf_got got
        cdef Link link
        cdef bytes value
        cdef char *into
        cdef Py_ssize_t shard = self.pick(k, n, space)
        cdef int status
        cdef attempts_t attempts = attempts_t(0, 0, 0)
        while True:
            link = <Link>self.links[shard]
            status = MF_NEED_CONNECTION
            if link is not None:
                status = mf_link_get(&link.link, MF_IMPATIENT, space, k, n, &got)
                if status == MF_WAIT:
                    with nogil:
                        status = mf_link_get(&link.link, MF_SURE if attempts.changed else MF_PATIENT, space, k, n, &got)
                try:
                    if status == MF_OK:
                        value = PyBytes_FromStringAndSize(NULL, got.value_len)
                        into = PyBytes_AS_STRING(value)
                        found.flags = got.flags
                        found.meta_len = got.meta_len
                        if got.value_len <= KEEP_GIL and link.link.fabric == MF_SHM:
                            status = mf_link_take(&link.link, &got, into, found.meta)
                        else:
                            with nogil:
                                status = mf_link_take(&link.link, &got, into, found.meta)
                        if status == MF_OK:
                            if got.value_len >= MF_LEND:
                                link.note_copies()
                            return value
                finally:
                    mf_link_leave(&link.link, &got)
            if status == MF_ABSENT:
                return None
            self.mend(shard, status, &attempts, key)

    def get(self, key):
        cdef const char *k
        cdef Py_ssize_t n
        cdef found_t found
        key_bytes(key, &k, &n)
        value = self.fetch(key, k, n, 0, &found)
        if value is None:
            raise KeyAbsent(f"no key {shown(key)} in this store")
        if found.flags & RARE:
            return self._unpack(PyBytes_FromStringAndSize(k, n), value, meta_of(&found), found.flags)
        return value

    def _load(self, bytes key, int space):
        cdef found_t found
        value = self.fetch(key, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, &found)
        return None if value is None else (value, meta_of(&found), found.flags)

    cdef Py_ssize_t fetch_into(self, object key, const char *k, Py_ssize_t n, int space, Py_buffer *view,
                               int refuse, found_t *found) except -2:
        """Length, or -1: absent. A value with one of the flags in `refuse` is not read."""
        cdef mf_got got
        cdef Link link
        cdef Py_ssize_t length = 0, shard = self.pick(k, n, space)
        cdef int status
        cdef attempts_t attempts = attempts_t(0, 0, 0)
        while True:
            link = <Link>self.links[shard]
            status = MF_NEED_CONNECTION
            if link is not None:
                status = mf_link_get(&link.link, MF_IMPATIENT, space, k, n, &got)
                if status == MF_WAIT:
                    with nogil:
                        status = mf_link_get(&link.link, MF_SURE if attempts.changed else MF_PATIENT, space, k, n, &got)
                if status == MF_OK:
                    length = got.value_len
                    found.flags = got.flags
                    found.meta_len = got.meta_len
                    if got.flags & refuse:
                        pass
                    elif length > view.len:
                        status = MF_SMALL_BUFFER
                    elif length <= KEEP_GIL and link.link.fabric == MF_SHM:
                        status = mf_link_take(&link.link, &got, view.buf, found.meta)
                    else:
                        with nogil:
                            status = mf_link_take(&link.link, &got, view.buf, found.meta)
                mf_link_leave(&link.link, &got)
            if status == MF_OK:
                if length >= <Py_ssize_t>MF_LEND:
                    link.note_copies()
                return length
            if status == MF_ABSENT:
                return -1
            if status == MF_SMALL_BUFFER:
                raise UsageError(f"key {shown(key)}: the value has {length} bytes, the buffer only {view.len}")
            self.mend(shard, status, &attempts, key)

    def get_into(self, key, buffer):
        cdef const char *k
        cdef Py_ssize_t n, length
        cdef found_t found
        cdef Py_buffer view
        key_bytes(key, &k, &n)
        writable(buffer, &view)
        try:
            length = self.fetch_into(key, k, n, 0, &view, RARE, &found)
        finally:
            PyBuffer_Release(&view)
        if length < 0:
            raise KeyAbsent(f"no key {shown(key)} in this store")
        if found.flags & RARE:
            return self._get_into_rare(PyBytes_FromStringAndSize(k, n), buffer)
        return length

    def _load_into(self, bytes key, int space, buffer):
        cdef Py_ssize_t length
        cdef found_t found
        cdef Py_buffer view
        writable(buffer, &view)
        try:
            length = self.fetch_into(key, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, &view, 0, &found)
        finally:
            PyBuffer_Release(&view)
        return None if length < 0 else (length, meta_of(&found), found.flags)

    def __contains__(self, key):
        cdef const char *k
        cdef Py_ssize_t n, shard
        cdef Link link
        cdef int status
        cdef attempts_t attempts = attempts_t(0, 0, 0)
        key_bytes(key, &k, &n)
        shard = self.pick(k, n, 0)
        while True:
            link = <Link>self.links[shard]
            status = MF_NEED_CONNECTION
            if link is not None:
                status = mf_link_has(&link.link, False, k, n)
                if status == MF_WAIT:
                    with nogil:
                        status = mf_link_has(&link.link, True, k, n)
            if status == MF_OK or status == MF_ABSENT:
                return status == MF_OK
            self.mend(shard, status, &attempts, key)

    # --- put and delete

    cdef bint change(self, object key, mf_putting *put, bint delete) except -1:
        """Whether it was done: something was there (delete) with the expected tag, if there is one; and what manifest it
        was (put.replaced)."""
        cdef Link link
        cdef Py_ssize_t shard = self.pick(<const char *>put.key, put.key_len, put.space)
        cdef int status
        cdef attempts_t attempts = attempts_t(0, 0, 0)
        while True:
            link = <Link>self.links[shard]
            status = MF_NEED_CONNECTION
            if link is not None:
                status = MF_WAIT
                if delete:
                    status = mf_link_delete(&link.link, False, put)
                elif put.value_len <= KEEP_GIL:
                    status = mf_link_put(&link.link, False, put)
                if status == MF_WAIT or status == MF_FULL:
                    with nogil:
                        if delete:
                            status = mf_link_delete(&link.link, True, put)
                        else:
                            status = mf_link_put(&link.link, True, put)
            if status == MF_OK or status == MF_ABSENT or status == MF_DIFFERS:
                if put.value_len >= MF_LEND:
                    link.note_copies()
                return status == MF_OK
            self.mend(shard, status, &attempts, key)

    def put(self, key, value):
        cdef const char *k
        cdef Py_ssize_t n
        cdef Py_buffer view
        cdef mf_putting put
        key_bytes(key, &k, &n)
        if not self.plain or not (type(value) is bytes or type(value) is bytearray):
            self._put_rare(PyBytes_FromStringAndSize(k, n), value)
            return
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        try:
            if view.len <= <Py_ssize_t>self.part_size:
                putting(&put, k, n, 0, &view)
                put.constant = type(value) is bytes
                self.change(key, &put, False)
                if put.replaced.length:
                    self._forget(manifest_of(&put.replaced))
                return
        except StoreFull:
            pass  # the rare path makes room, if it can
        finally:
            PyBuffer_Release(&view)
        self._put_rare(PyBytes_FromStringAndSize(k, n), value)

    def _save(self, bytes key, int space, value, bytes meta, int flags):
        cdef Py_buffer view
        cdef mf_putting put
        if PyBytes_GET_SIZE(meta) > MF_MAX_META:
            raise ValueTooLarge(f"key {shown(key)}: its description has {len(meta)} bytes, at most {MF_MAX_META} fit")
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        try:
            putting(&put, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, &view)
            put.constant = type(value) is bytes or (type(value) is memoryview and type(value.obj) is bytes)
            put.meta = PyBytes_AS_STRING(meta)
            put.meta_len = PyBytes_GET_SIZE(meta)
            put.flags = flags
            self.change(key, &put, False)
        finally:
            PyBuffer_Release(&view)
        return manifest_of(&put.replaced) if put.replaced.length else None

    def delete(self, key):
        cdef const char *k
        cdef Py_ssize_t n
        cdef mf_putting put
        key_bytes(key, &k, &n)
        putting(&put, k, n, 0, NULL)
        there = self.change(key, &put, True)
        if put.replaced.length:
            self._forget(manifest_of(&put.replaced))
        return there

    def _remove(self, bytes key, int space):
        cdef mf_putting put
        putting(&put, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, NULL)
        there = self.change(key, &put, True)
        return there, manifest_of(&put.replaced) if put.replaced.length else None

    # --- on a condition

    def _save_if(self, bytes key, int space, value, bytes tag, int flags, bytes expected):
        cdef Py_buffer view
        cdef mf_putting put
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        try:
            putting(&put, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, &view)
            tag_of(tag)
            put.meta = PyBytes_AS_STRING(tag)
            put.meta_len = MF_TAG
            put.flags = flags
            put.conditional = True
            put.expected = tag_of(expected) if expected else 0
            return self.change(key, &put, False)
        finally:
            PyBuffer_Release(&view)

    def _remove_if(self, bytes key, int space, bytes expected):
        cdef mf_putting put
        putting(&put, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, NULL)
        put.conditional = True
        put.expected = tag_of(expected)
        return self.change(key, &put, True)

    # --- many

    def get_many(self, keys):
        cdef list wanted = list(keys), values = [None] * len(wanted)
        cdef dict by_shard = {}
        cdef Py_ssize_t i, shard
        for i in range(len(wanted)):
            shard = self.remote_shard(wanted[i])
            if shard < 0:
                values[i] = self.get_or_none(wanted[i])
            else:
                by_shard.setdefault(shard, []).append(i)
        for shard, indices in by_shard.items():
            if isinstance(self.links[shard], VerbsLink):
                self.read_many(shard, indices, wanted, values)
            else:
                self.pipeline_gets(shard, indices, wanted, values)
        return values

    cdef Py_ssize_t remote_shard(self, object key) except -2:
        """Where requests for it can be sent one behind the other; -1: nothing to gain."""
        cdef const char *k
        cdef Py_ssize_t n, shard
        key_bytes(key, &k, &n)
        shard = self.pick(k, n, 0)
        link = <Link>self.links[shard]
        return -1 if link is None or link.link.fabric == MF_SHM else shard

    cdef object get_or_none(self, object key):
        try:
            return self.get(key)
        except KeyAbsent:
            return None

    cdef mf_stream *stream_of(self, Link link) noexcept:
        return NULL if link is None else mf_link_stream(&link.link)

    cdef int pipeline_gets(self, Py_ssize_t shard, list indices, list keys, list values) except -1:
        """One window of requests after the other; what does not go smoothly is asked for singly."""
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef const char *k
        cdef Py_ssize_t n, first = 0, end, window
        cdef int status
        cdef bytes value
        cdef char *into
        while first < len(indices):
            link = <Link>self.links[shard]
            stream = self.stream_of(link)
            if stream is not NULL:
                end = first
                window = 0
                status = MF_OK
                try:
                    while status == MF_OK and end < len(indices) and end - first < 2 * MF_WINDOW_COUNT:
                        key_bytes(keys[<Py_ssize_t>indices[end]], &k, &n)
                        window += sizeof(request) + n
                        if window > MF_WINDOW and end > first:
                            break
                        clear(&request, MF_GET, n)
                        status = mf_ask(stream, &request, k, NULL, NULL)
                        end += 1
                    while first < end and status == MF_OK:
                        with nogil:
                            status = mf_pull_reply(stream, &pull)
                        if status == MF_OK:
                            value = PyBytes_FromStringAndSize(NULL, pull.reply.value_len)
                            into = PyBytes_AS_STRING(value)
                            with nogil:
                                status = mf_pull_value(stream, &pull, into)
                            if status == MF_OK and pull.reply.flags & RARE:
                                break  # unpacking may need this very stream
                            values[<Py_ssize_t>indices[first]] = value
                        elif status == MF_ABSENT:
                            status = MF_OK
                        first += status == MF_OK
                finally:
                    if first < end:
                        stream.error = -1  # replies are still in it
                    mf_pool_give(link.link.pool, stream)
                if first == end:
                    continue
            values[<Py_ssize_t>indices[first]] = self.get_or_none(keys[<Py_ssize_t>indices[first]])
            first += 1

    cdef int read_many(self, Py_ssize_t shard, list indices, list keys, list values) except -1:
        """As pipeline_gets, over verbs: with two rounds of reads for each window."""
        cdef mf_wanted wanted[MF_WANTED_MOST]
        cdef mf_op found
        cdef mf_stream *stream
        cdef Link link
        cdef const char *k
        cdef Py_ssize_t n, index, first = 0
        cdef unsigned i, count
        cdef int status
        cdef bytes value
        while first < len(indices):
            count = min(len(indices) - first, <Py_ssize_t>MF_WANTED_MOST)
            for i in range(count):
                key_bytes(keys[<Py_ssize_t>indices[first + i]], &k, &n)
                wanted[i].key = k
                wanted[i].key_len = n
            link = <Link>self.links[shard]
            stream = self.stream_of(link)
            status = MF_NEED_CONNECTION
            left = list(range(count))
            if stream is not NULL and link.link.fabric == MF_VERBS:
                left = []
                with nogil:
                    status = mf_batch_get(&link.link, stream, wanted, count)
                for i in range(count):
                    if status == MF_OK and wanted[i].status == MF_OK:
                        wanted[i].status = mf_batch_open(&link.link, stream, &wanted[i], &found)
                        if wanted[i].status == MF_OK and found.chunks == 0 and not found.flags & RARE:
                            value = PyBytes_FromStringAndSize(NULL, found.value_len)
                            if mf_get_copy(&found, PyBytes_AS_STRING(value), NULL) == MF_OK:
                                values[<Py_ssize_t>indices[first + i]] = value
                                continue
                    left.append(i)
            if stream is not NULL:
                mf_pool_give(link.link.pool, stream)
            for i in left:
                index = indices[first + i]
                values[index] = self.get_or_none(keys[index])
            first += count

    def put_many(self, items):
        cdef list pairs = list(items.items()) if hasattr(items, "items") else list(items)
        cdef dict by_shard = {}
        cdef Py_ssize_t shard
        for name, value in pairs:
            key = as_key(name)  # one key may stand there as str and as bytes
            shard = self.remote_shard(key) if self.plain and type(value) is bytes else -1
            if shard >= 0 and PyBytes_GET_SIZE(value) < MF_WINDOW:
                by_shard.setdefault(shard, {})[key] = value
                continue
            for some in by_shard.values():
                some.pop(key, None)
            self.put(key, value)
        for shard, some in by_shard.items():
            self.pipeline_puts(shard, list(some.items()))

    cdef int pipeline_puts(self, Py_ssize_t shard, list pairs) except -1:
        """As pipeline_gets. A broken connection leaves changes that may have taken effect: `changes`."""
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_putting put
        cdef mf_change changes[MF_WINDOW_COUNT]
        cdef Py_buffer view
        cdef mf_stream *stream
        cdef Link link
        cdef const char *k
        cdef Py_ssize_t n, first = 0, start, end, window, most
        cdef int status
        cdef list manifests = []
        while first < len(pairs):
            link = <Link>self.links[shard]
            stream = self.stream_of(link)
            start = end = first
            if stream is not NULL:
                window = 0
                most = MF_LANDING if link.link.fabric == MF_VERBS else MF_WINDOW
                status = MF_OK
                try:
                    while status == MF_OK and end < len(pairs) and end - start < MF_WINDOW_COUNT:
                        key, value = pairs[end]
                        key_bytes(key, &k, &n)
                        window += sizeof(request) + n + PyBytes_GET_SIZE(value)
                        if window > most and end > start:
                            break
                        clear(&request, MF_PUT, n)
                        request.value_len = PyBytes_GET_SIZE(value)
                        mf_number(stream, &request, &changes[end - start])
                        status = mf_batch_put(stream, &request, k, PyBytes_AS_STRING(value))
                        end += 1
                    while first < end and status == MF_OK:
                        with nogil:
                            status = mf_batch_reply(&link.link, stream, &put.replaced)
                        if status == MF_OK:
                            first += 1
                            if put.replaced.length:
                                manifests.append(manifest_of(&put.replaced))
                finally:
                    if first < end:
                        stream.error = -1  # replies are still in it
                    mf_pool_give(link.link.pool, stream)
            while manifests:
                self._forget(manifests.pop())
            # Singly, in their order: those of this window that have no answer, or one if no stream was free.
            while first < end or (first == start and first < len(pairs)):
                key, value = pairs[first]
                key_bytes(key, &k, &n)
                PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
                try:
                    putting(&put, k, n, 0, &view)
                    if first < end:
                        put.change = changes[first - start]
                    self.change(key, &put, False)
                finally:
                    PyBuffer_Release(&view)
                if put.replaced.length:
                    self._forget(manifest_of(&put.replaced))
                first += 1

    def _scan(self, Py_ssize_t shard, uint64_t cursor, int space):
        cdef Link link
        cdef size_t room = MF_GROUP * (16 + MF_MAX_KEY), length = 0
        cdef bytes out = PyBytes_FromStringAndSize(NULL, room)
        cdef uint8_t *data = <uint8_t *>PyBytes_AS_STRING(out)
        cdef uint64_t next_
        cdef int status
        cdef attempts_t attempts = attempts_t(0, 0, 0)
        if not 0 <= shard < len(self.links):
            raise IndexError(shard)
        while True:
            link = <Link>self.links[shard]
            next_ = cursor
            status = MF_NEED_CONNECTION
            if link is not None:
                with nogil:
                    status = mf_link_scan(&link.link, space, &next_, data, room, &length)
            if status == MF_OK:
                return next_, records(data, length)
            self.mend(shard, status, &attempts, b"")


cdef void putting(mf_putting *put, const char *k, Py_ssize_t n, int space, Py_buffer *view) noexcept nogil:
    put.space = space
    put.flags = 0
    put.conditional = False
    put.expected = 0
    put.constant = False
    put.key = k
    put.key_len = n
    put.meta = NULL
    put.meta_len = 0
    put.value = NULL if view is NULL else view.buf
    put.value_len = 0 if view is NULL else view.len
    put.change.id = 0
    put.replaced.length = 0


cdef uint64_t tag_of(bytes tag) except 0:
    cdef uint64_t number = 0
    if PyBytes_GET_SIZE(tag) == MF_TAG:
        memcpy(&number, PyBytes_AS_STRING(tag), MF_TAG)
    if number == 0:
        raise UsageError(f"a tag is {MF_TAG} bytes that are not all zero, not {tag!r}")
    return number


cdef void clear(mf_request *request, uint8_t verb, uint32_t key_len) noexcept nogil:
    memset(request, 0, sizeof(mf_request))
    request.verb = verb
    request.key_len = key_len


cdef bytes meta_of(found_t *found):
    return PyBytes_FromStringAndSize(found.meta, found.meta_len)


cdef bytes manifest_of(mf_replaced *replaced):
    return PyBytes_FromStringAndSize(<char *>replaced.manifest, replaced.length)


cdef list records(const uint8_t *data, size_t length):
    cdef list found = []
    cdef uint32_t numbers[2]
    cdef uint64_t size
    cdef size_t at = 0
    while at + 16 <= length:
        memcpy(numbers, data + at, 8)
        memcpy(&size, data + at + 8, 8)
        if numbers[0] > length - at - 16:
            raise ProtocolError("the memory function sent a malformed list of keys")
        found.append((PyBytes_FromStringAndSize(<char *>data + at + 16, numbers[0]), numbers[1], size))
        at += 16 + numbers[0]
    return found


cdef int buffer_of(object buffer, Py_buffer *view, int flags) except -1:
    """Its bytes: contiguous, and no references to Python objects among them."""
    if type(buffer) is bytes or type(buffer) is bytearray:
        return PyObject_GetBuffer(buffer, view, flags)
    try:
        try:
            PyObject_GetBuffer(buffer, view, flags | PyBUF_FORMAT | PyBUF_ND)
        except ValueError:  # NumPy knows no format for its dates, but has their bytes
            PyObject_GetBuffer(buffer, view, flags)
    except (BufferError, TypeError, ValueError) as error:
        raise UsageError(f"cannot use a {type(buffer).__name__} as a buffer: {error}") from None
    if view.format is not NULL and b"O" in view.format:
        PyBuffer_Release(view)
        raise UsageError(f"a {type(buffer).__name__} of Python objects has no bytes of its own to move")
    return 0


cdef int writable(object buffer, Py_buffer *view) except -1:
    if type(buffer) is bytes:
        raise UsageError("cannot write into bytes; take a bytearray")
    return buffer_of(buffer, view, PyBUF_WRITABLE)


# --- a region -------------------------------------------------------------------------------------------


cdef class RegionCore:
    cdef object link
    cdef readonly uint64_t size

    def __init__(self, uint64_t size):
        self.size = size

    def _set_link(self, Link link):
        self.link = link

    def _get_link(self):
        return self.link

    def _repair(self, shard, reason, attempt):
        raise NotImplementedError

    cdef int check(self, object offset, object length) except -1:
        if not (isinstance(offset, int) and isinstance(length, int)):
            raise UsageError(f"offset {offset!r} and length {length!r} are whole numbers of bytes")
        if not (0 <= offset and 0 <= length and offset + length <= self.size):
            raise UsageError(f"bytes {offset} to {offset + length} are not in this region of {self.size} bytes")
        return 0

    cdef int run(self, int verb, uint64_t offset, char *data, uint64_t length, uint64_t b, uint64_t c,
                 uint64_t *before) except -1:
        cdef Link link
        cdef int status, attempt = 0
        while True:
            link = <Link>self.link
            status = MF_NEED_CONNECTION
            if link is not None:
                with nogil:
                    status = mf_link_region(&link.link, verb, offset, data, length, b, c, before)
            if status == MF_OK:
                if length >= MF_LEND:
                    link.note_copies()
                return 0
            if status == MF_TIMEOUT:
                raise DeadlineExceeded(f"offset {offset}: the memory function did not answer in time")
            if status == MF_BAD:
                raise ProtocolError(f"offset {offset}: the memory function refused the request")
            if status == MF_NOT_HERE:
                raise FabricUnavailable(
                    f"offset {offset}: the words of this region are changed by network devices, as long as a client is "
                    "connected to it over verbs; connect over verbs too"
                )
            if status == MF_BROKEN and verb >= MF_SWAP:
                raise TransportError(
                    f"offset {offset}: the connection broke; the word may or may not have been changed, read it"
                )
            attempt += 1
            self._repair(0, status, attempt)

    cdef int transfer(self, int verb, uint64_t offset, char *data, uint64_t length) except -1:
        """In pieces: each has the whole deadline for itself."""
        cdef uint64_t some, before
        while True:
            some = length if length < PIECE else PIECE
            self.run(verb, offset, data, some, 0, 0, &before)
            offset += some
            data += some
            length -= some
            if length == 0:
                return 0

    def read(self, offset, length):
        self.check(offset, length)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, length)
        self.transfer(MF_READ, offset, PyBytes_AS_STRING(data), length)
        return data

    def read_into(self, offset, buffer):
        cdef Py_buffer view
        writable(buffer, &view)
        try:
            self.check(offset, view.len)
            self.transfer(MF_READ, offset, <char *>view.buf, view.len)
            return view.len
        finally:
            PyBuffer_Release(&view)

    def write(self, offset, data):
        cdef Py_buffer view
        buffer_of(data, &view, PyBUF_SIMPLE)
        try:
            self.check(offset, view.len)
            self.transfer(MF_WRITE, offset, <char *>view.buf, view.len)
            return view.len
        finally:
            PyBuffer_Release(&view)

    cdef uint64_t word(self, int verb, object offset, object b, object c) except? 0:
        cdef uint64_t before = 0
        self.check(offset, 8)
        if offset % 8:
            raise UsageError(f"offset {offset}: words lie at multiples of 8")
        self.run(verb, offset, NULL, 0, <uint64_t>(b & 0xFFFFFFFFFFFFFFFF), <uint64_t>(c & 0xFFFFFFFFFFFFFFFF), &before)
        return before

    def compare_swap(self, offset, expected, new):
        return self.word(MF_SWAP, offset, expected, new)

    def fetch_add(self, offset, amount):
        return self.word(MF_ADD, offset, 0, amount)

