# cython: language_level=3, boundscheck=False, wraparound=False, binding=False
"""Python's face of memfaas/native: see _native.pyi for what each thing does.

The fast path of an operation on mapped memory runs with the GIL held and never waits: it is shorter
than letting the GIL go. Whatever copies much or may wait runs without the GIL.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.errno cimport EINVAL, EMFILE, ENOMEM, EPERM, ETIMEDOUT
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

import os
import secrets

from memfaas.errors import (
    DeadlineExceeded,
    KeyAbsent,
    ProtocolError,
    StoreFull,
    UsageError,
    ValueCorrupt,
    ValueTooLarge,
)


cdef extern from "memfaas.h" nogil:
    enum:
        MF_SHARD, MF_REGION
        MF_MIN_SHARD, MF_MAX_KEY, MF_MAX_META, MF_MAX_MANIFEST, MF_MANIFEST
        MF_STATE_REVOKED, MF_PARTICIPANTS
        MF_OK, MF_ABSENT, MF_FULL, MF_TOO_LARGE, MF_SMALL_BUFFER, MF_CORRUPT, MF_TIMEOUT, MF_WAIT, MF_BAD
        MF_NEED_CONNECTION, MF_BROKEN, MF_REVOKED, MF_FROZEN, MF_STALE
    struct mf_header:
        uint8_t lease[16]
        uint8_t store[16]
        uint32_t kind
        uint64_t epoch, shard, size, data_bytes, control_bytes, part_size
    struct mf_participant:
        uint32_t state, pid
        uint64_t start_time
    struct mf_control:
        mf_participant participants[1024]
    struct mf_memory:
        mf_header at
        mf_control *control
        size_t populated
        uint32_t generation
    struct mf_op:
        uint8_t space, flags
        uint64_t value_len
        uint32_t meta_len
    struct mf_replaced:
        uint32_t length
        uint8_t manifest[64]
    struct mf_stats_t "mf_stats":
        uint64_t keys, parts, used, size, free_spans, epoch, participants

    uint64_t mf_hash(const void *data, size_t length, uint64_t seed)
    uint64_t mf_hash_key(const void *key, size_t length, unsigned space)
    void mf_geometry(int kind, uint64_t size, mf_header *out)
    int mf_format(int data_fd, int control_fd, const mf_header *header)
    int mf_map(mf_memory *memory, int data_fd, int control_fd, uint32_t participant)
    void mf_unmap(mf_memory *memory)
    int mf_populate(mf_memory *memory, size_t limit)
    int mf_attach(mf_memory *memory, uint32_t pid, uint64_t start_time, uint32_t *participant)
    void mf_set_state(mf_memory *memory, uint32_t state)
    uint32_t mf_fork_generation()
    int64_t mf_now()
    void mf_op_begin(mf_op *op, mf_memory *memory, int64_t timeout_ns)
    void mf_op_end(mf_op *op)
    int mf_get(mf_op *op, const void *key, uint32_t key_len)
    int mf_get_copy(mf_op *op, void *into, void *meta)
    int mf_put(mf_op *op, const void *key, uint32_t key_len, const void *meta, uint32_t meta_len,
               const void *value, uint64_t value_len, uint8_t flags, uint64_t writer, mf_replaced *replaced)
    int mf_delete(mf_op *op, const void *key, uint32_t key_len, mf_replaced *replaced)
    int mf_scan(mf_op *op, uint64_t *cursor, uint8_t *out, size_t room, size_t *length)
    int mf_stats_of "mf_stats"(mf_memory *memory, mf_stats_t *out)
    int mf_region_read(mf_op *op, uint64_t offset, void *into, uint64_t length)
    int mf_region_write(mf_op *op, uint64_t offset, const void *data, uint64_t length)
    int mf_region_swap(mf_op *op, uint64_t offset, uint64_t expected, uint64_t new_, uint64_t *before)
    int mf_region_add(mf_op *op, uint64_t offset, uint64_t amount, uint64_t *before)
    int mf_reap(mf_memory *memory, uint32_t participant, int64_t deadline)

cdef extern from "wire.h" nogil:
    enum:
        MF_GET, MF_PUT, MF_DELETE, MF_SCAN, MF_STATS, MF_READ, MF_WRITE, MF_SWAP, MF_ADD
        MF_HEAD_ONLY, MF_WINDOW, MF_WINDOW_COUNT, MF_GROUP
    struct mf_request:
        uint8_t verb, flags, space
        uint32_t key_len, meta_len
        uint64_t value_len, a, b, c
    struct mf_reply:
        uint8_t status, flags
        uint32_t meta_len
        uint64_t value_len, a
    struct mf_stream:
        pass
    struct mf_pull:
        mf_reply reply
        uint8_t meta[1024]
    struct mf_pool:
        pass
    struct mf_server:
        pass
    bint mf_stream_read(mf_stream *stream, void *into, size_t length)
    mf_server *mf_server_new(mf_memory *memory)
    int mf_server_serve(mf_server *server, int fd)
    int mf_server_connections(mf_server *server)
    bint mf_server_stop(mf_server *server, int64_t timeout_ns)
    void mf_server_free(mf_server *server)
    mf_pool *mf_pool_new(int64_t timeout_ns)
    int mf_pool_add(mf_pool *pool, int fd)
    mf_stream *mf_pool_take(mf_pool *pool)
    void mf_pool_give(mf_pool *pool, mf_stream *stream)
    void mf_pool_close(mf_pool *pool)
    void mf_pool_free(mf_pool *pool)
    uint32_t mf_pool_generation(mf_pool *pool)
    int mf_ask(mf_stream *stream, const mf_request *request, const void *key, const void *meta, const void *value)
    int mf_pull_reply(mf_stream *stream, mf_pull *pull)
    int mf_pull_value(mf_stream *stream, mf_pull *pull, void *into)
    int mf_pull_bytes(mf_stream *stream, void *into, size_t length)
    int mf_pull_replaced(mf_stream *stream, mf_pull *pull, mf_replaced *replaced)


MAX_KEY = MF_MAX_KEY
MAX_META = MF_MAX_META
MIN_SHARD = MF_MIN_SHARD
USER = 0
PART = 1
FLAG_LZ4 = 1
FLAG_MANIFEST = MF_MANIFEST
FLAG_ARRAY = 4
NEED_CONNECTION = MF_NEED_CONNECTION
BROKEN = MF_BROKEN
REVOKED = MF_REVOKED
FROZEN = MF_FROZEN
STALE = MF_STALE

cdef struct found_t:
    # What came with a value.
    int flags
    uint32_t meta_len
    char meta[1024]

cdef enum:
    KEEP_GIL = 16384  # bytes: copying more takes longer than letting the GIL go and coming back
    RARE = 3          # FLAG_LZ4 | FLAG_MANIFEST: the store has to unpack the value
    PIECE = 67108864  # bytes of a region in one request


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
                  uint64_t epoch):
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
        error = mf_format(data_fd, control_fd, &header)
    if error:
        raise OSError(error, os.strerror(error))


def fork_generation():
    return mf_fork_generation()


# --- the owner's side -----------------------------------------------------------------------------


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
        mf_set_state(&self.memory, MF_STATE_REVOKED)

    def attach(self, uint32_t pid, uint64_t start_time):
        cdef uint32_t participant
        self.check()
        cdef int error = mf_attach(&self.memory, pid, start_time, &participant)
        if error:
            raise OSError(error, os.strerror(error))
        return participant

    def reap(self, uint32_t participant):
        cdef int error
        cdef int64_t limit_ns = 10_000_000_000
        self.check()
        if participant >= MF_PARTICIPANTS:
            raise ValueError(f"no such participant: {participant}")
        with nogil:
            error = mf_reap(&self.memory, participant, mf_now() + limit_ns)
        if error == ETIMEDOUT:
            raise TimeoutError("operations that began before did not end in 10 s; some memory stays unused")
        if error:
            raise OSError(error, os.strerror(error))

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


cdef class Server:
    cdef Memory memory
    cdef mf_server *server

    def __init__(self, Memory memory):
        memory.check()
        self.memory = memory
        self.server = mf_server_new(&memory.memory)
        if self.server is NULL:
            raise MemoryError

    def serve(self, int fd):
        cdef int error = mf_server_serve(self.server, fd)
        if error:
            os.close(fd)
            raise OSError(error, os.strerror(error))

    def connections(self):
        return mf_server_connections(self.server)

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


# --- links ------------------------------------------------------------------------------------------


cdef class Link:
    cdef mf_memory memory  # shm
    cdef mf_pool *pool     # tcp
    cdef bint mapped, closed
    cdef int64_t timeout_ns
    cdef object __weakref__

    cdef int usable(self) noexcept nogil:
        """MF_OK, or why not."""
        if self.closed:
            return MF_NEED_CONNECTION
        if (self.memory.generation if self.mapped else mf_pool_generation(self.pool)) != mf_fork_generation():
            return MF_STALE
        return MF_OK

    def close(self):
        # What other threads are doing right now goes on; the mapping goes with the last reference.
        self.closed = True
        if self.pool is not NULL:
            mf_pool_close(self.pool)

    def stats(self):
        cdef mf_stats_t stats
        cdef mf_request request
        cdef mf_stream *stream
        cdef mf_pull pull
        cdef int status = self.usable()
        if status == MF_OK and self.mapped:
            with nogil:
                status = mf_stats_of(&self.memory, &stats)
        elif status == MF_OK:
            stream = mf_pool_take(self.pool)
            if stream is NULL:
                status = MF_NEED_CONNECTION
            else:
                clear(&request, MF_STATS, 0)
                with nogil:
                    status = mf_ask(stream, &request, NULL, NULL, NULL)
                    if status == MF_OK:
                        status = mf_pull_reply(stream, &pull)
                    if status == MF_OK:
                        status = mf_pull_bytes(stream, &stats, sizeof(stats))
                    mf_pool_give(self.pool, stream)
        if status != MF_OK:
            raise LinkDown(status)
        return stats

    def __dealloc__(self):
        if self.pool is not NULL:
            mf_pool_free(self.pool)
        if self.mapped:
            mf_unmap(&self.memory)


class LinkDown(Exception):
    """A link can't serve right now; `args[0]` is the reason, as in `_repair`."""


cdef class ShmLink(Link):
    fabric = "shm"

    def __init__(self, int data_fd, int control_fd, uint32_t participant, double timeout_s):
        cdef int error = mf_map(&self.memory, data_fd, control_fd, participant)
        if error == EINVAL:
            raise ProtocolError("what the memory function sent is not a memory of this version of memfaas")
        if error:
            raise OSError(error, os.strerror(error))
        self.mapped = True
        self.timeout_ns = <int64_t>(timeout_s * 1e9)


cdef class TcpLink(Link):
    fabric = "tcp"

    def __init__(self, double timeout_s):
        self.timeout_ns = <int64_t>(timeout_s * 1e9)
        self.pool = mf_pool_new(self.timeout_ns)
        if self.pool is NULL:
            raise MemoryError

    def add(self, int fd):
        if mf_pool_add(self.pool, fd):
            os.close(fd)
            raise MemoryError


cdef void note(found_t *found, mf_pull *pull) noexcept nogil:
    found.flags = pull.reply.flags
    found.meta_len = pull.reply.meta_len
    memcpy(found.meta, pull.meta, pull.reply.meta_len)


cdef bytes meta_of(found_t *found):
    return PyBytes_FromStringAndSize(found.meta, found.meta_len)


cdef void clear(mf_request *request, uint8_t verb, uint8_t space) noexcept nogil:
    request.verb = verb
    request.flags = 0
    request.space = space
    request.key_len = request.meta_len = 0
    request.value_len = request.a = request.b = request.c = 0


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


def shown(key):
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(key)} long)"


cdef class StoreCore:
    cdef list links
    cdef list ids  # 64-bit, from the shards' identities
    cdef readonly uint64_t part_size
    cdef bint plain
    cdef uint64_t writer  # of the next put: random start, so that no two clients share one

    def __init__(self, list shard_ids, uint64_t part_size, bint plain):
        if not shard_ids:
            raise UsageError("a store has at least one shard")
        self.links = [None] * len(shard_ids)
        self.ids = [mf_hash(PyBytes_AS_STRING(i), 16, 0) for i in shard_ids]
        self.part_size = part_size
        self.plain = plain
        self.writer = int.from_bytes(secrets.token_bytes(8), "little")

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

    cdef int mend(self, Py_ssize_t shard, int status, int attempt, object key) except -1:
        """The operation did not succeed: raise, or make a further attempt sensible."""
        if status == MF_FULL:
            raise StoreFull(f"key {shown(key)}: its shard has no room; delete keys, or make the store larger")
        if status == MF_TOO_LARGE:
            raise ValueTooLarge(f"key {shown(key)}: the value is larger than the shard takes")
        if status == MF_TIMEOUT:
            raise DeadlineExceeded(f"key {shown(key)}: the shard did not answer in time")
        if status == MF_CORRUPT:
            if attempt >= 3:
                raise ValueCorrupt(f"key {shown(key)}: the stored bytes do not match their checksum; put it again")
        elif status == MF_BAD:
            raise ProtocolError(f"key {shown(key)}: the memory function refused the request")
        else:
            self._repair(shard, status, attempt)
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
        cdef mf_op op
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef bytes value
        cdef char *into
        cdef Py_ssize_t shard = self.pick(k, n, space)
        cdef int status, attempt = 0
        while True:
            link = <Link>self.links[shard]
            value = None
            if link is None:
                status = MF_NEED_CONNECTION
            elif link.closed:
                status = MF_NEED_CONNECTION
            elif link.mapped:
                mf_op_begin(&op, &link.memory, 0)
                op.space = space
                status = mf_get(&op, k, n)
                if status == MF_WAIT:
                    with nogil:
                        mf_op_begin(&op, &link.memory, link.timeout_ns)
                        op.space = space
                        status = mf_get(&op, k, n)
                if status == MF_OK:
                    try:
                        value = PyBytes_FromStringAndSize(NULL, op.value_len)
                        into = PyBytes_AS_STRING(value)
                        if op.value_len > KEEP_GIL:
                            with nogil:
                                status = mf_get_copy(&op, into, found.meta)
                        else:
                            status = mf_get_copy(&op, into, found.meta)
                        found.meta_len = op.meta_len
                        found.flags = op.flags
                    finally:
                        mf_op_end(&op)
                else:
                    mf_op_end(&op)
            elif link.usable() != MF_OK:
                status = link.usable()
            else:
                stream = mf_pool_take(link.pool)
                if stream is NULL:
                    status = MF_NEED_CONNECTION
                else:
                    with nogil:
                        clear(&request, MF_GET, space)
                        request.key_len = n
                        status = mf_ask(stream, &request, k, NULL, NULL)
                        if status == MF_OK:
                            status = mf_pull_reply(stream, &pull)
                    if status == MF_OK:
                        try:
                            value = self.pull_value(link, stream, &pull, &status)
                        finally:
                            if value is None:
                                abandon(stream)
                            mf_pool_give(link.pool, stream)
                        note(found, &pull)
                    else:
                        mf_pool_give(link.pool, stream)
            if status == MF_OK:
                return value
            if status == MF_ABSENT:
                return None
            attempt += 1
            self.mend(shard, status, attempt, key)

    cdef bytes pull_value(self, Link link, mf_stream *stream, mf_pull *pull, int *status):
        cdef bytes value = PyBytes_FromStringAndSize(NULL, pull.reply.value_len)
        cdef char *into = PyBytes_AS_STRING(value)
        with nogil:
            status[0] = mf_pull_value(stream, pull, into)
        return value

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
        cdef mf_op op
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef Py_ssize_t length = 0, shard = self.pick(k, n, space)
        cdef int status, attempt = 0
        while True:
            link = <Link>self.links[shard]
            if link is None:
                status = MF_NEED_CONNECTION
            elif link.usable() != MF_OK:
                status = link.usable()
            elif link.mapped:
                with nogil:
                    mf_op_begin(&op, &link.memory, link.timeout_ns)
                    op.space = space
                    status = mf_get(&op, k, n)
                    if status == MF_OK:
                        length = op.value_len
                        found.flags = op.flags
                        found.meta_len = op.meta_len
                        if op.flags & refuse:
                            pass
                        elif length > view.len:
                            status = MF_SMALL_BUFFER
                        else:
                            status = mf_get_copy(&op, view.buf, found.meta)
                    mf_op_end(&op)
            else:
                stream = mf_pool_take(link.pool)
                if stream is NULL:
                    status = MF_NEED_CONNECTION
                else:
                    with nogil:
                        clear(&request, MF_GET, space)
                        request.key_len = n
                        status = mf_ask(stream, &request, k, NULL, NULL)
                        if status == MF_OK:
                            status = mf_pull_reply(stream, &pull)
                        if status == MF_OK:
                            length = pull.reply.value_len
                            note(found, &pull)
                            if pull.reply.flags & refuse:
                                abandon(stream)  # the value is still in it
                            elif length > view.len:
                                status = MF_SMALL_BUFFER
                                abandon(stream)
                            else:
                                status = mf_pull_value(stream, &pull, view.buf)
                        mf_pool_give(link.pool, stream)
            if status == MF_OK:
                return length
            if status == MF_ABSENT:
                return -1
            if status == MF_SMALL_BUFFER:
                raise UsageError(f"key {shown(key)}: the value has {length} bytes, the buffer only {view.len}")
            attempt += 1
            self.mend(shard, status, attempt, key)

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
        cdef mf_op op
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef int status, attempt = 0
        key_bytes(key, &k, &n)
        shard = self.pick(k, n, 0)
        while True:
            link = <Link>self.links[shard]
            if link is None:
                status = MF_NEED_CONNECTION
            elif link.usable() != MF_OK:
                status = link.usable()
            elif link.mapped:
                with nogil:
                    mf_op_begin(&op, &link.memory, link.timeout_ns)
                    status = mf_get(&op, k, n)
                    mf_op_end(&op)
            else:
                stream = mf_pool_take(link.pool)
                if stream is NULL:
                    status = MF_NEED_CONNECTION
                else:
                    with nogil:
                        clear(&request, MF_GET, 0)
                        request.flags = MF_HEAD_ONLY
                        request.key_len = n
                        status = mf_ask(stream, &request, k, NULL, NULL)
                        if status == MF_OK:
                            status = mf_pull_reply(stream, &pull)
                        mf_pool_give(link.pool, stream)
            if status == MF_OK or status == MF_ABSENT:
                return status == MF_OK
            attempt += 1
            self.mend(shard, status, attempt, key)

    # --- put and delete

    cdef bytes save(self, object key, const char *k, Py_ssize_t n, int space, const void *value, Py_ssize_t length,
                    const char *meta, Py_ssize_t meta_len, int flags):
        cdef mf_op op
        cdef mf_replaced replaced
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef Py_ssize_t shard = self.pick(k, n, space)
        cdef int status, attempt = 0
        cdef uint64_t writer
        self.writer += 1
        writer = self.writer
        replaced.length = 0
        while True:
            link = <Link>self.links[shard]
            if link is None:
                status = MF_NEED_CONNECTION
            elif link.closed:
                status = MF_NEED_CONNECTION
            elif link.mapped:
                status = MF_WAIT
                if length <= KEEP_GIL:
                    mf_op_begin(&op, &link.memory, 0)
                    op.space = space
                    status = mf_put(&op, k, n, meta, meta_len, value, length, flags, writer, &replaced)
                    mf_op_end(&op)
                if status == MF_WAIT or status == MF_FULL:
                    with nogil:
                        mf_op_begin(&op, &link.memory, link.timeout_ns)
                        op.space = space
                        status = mf_put(&op, k, n, meta, meta_len, value, length, flags, writer, &replaced)
                        mf_op_end(&op)
            elif link.usable() != MF_OK:
                status = link.usable()
            else:
                stream = mf_pool_take(link.pool)
                if stream is NULL:
                    status = MF_NEED_CONNECTION
                else:
                    with nogil:
                        clear(&request, MF_PUT, space)
                        request.flags = flags
                        request.key_len = n
                        request.meta_len = meta_len
                        request.value_len = length
                        request.a = writer
                        status = mf_ask(stream, &request, k, meta, value)
                        if status == MF_OK:
                            status = mf_pull_reply(stream, &pull)
                        if status == MF_OK:
                            status = mf_pull_replaced(stream, &pull, &replaced)
                        mf_pool_give(link.pool, stream)
            if status == MF_OK:
                break
            attempt += 1
            self.mend(shard, status, attempt, key)
        return manifest_of(&replaced) if replaced.length else None

    def put(self, key, value):
        cdef const char *k
        cdef Py_ssize_t n
        cdef Py_buffer view
        cdef bytes replaced
        key_bytes(key, &k, &n)
        if not self.plain or not (type(value) is bytes or type(value) is bytearray):
            self._put_rare(PyBytes_FromStringAndSize(k, n), value)
            return
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        try:
            if view.len <= <Py_ssize_t>self.part_size:
                replaced = self.save(key, k, n, 0, view.buf, view.len, NULL, 0, 0)
                if replaced is not None:
                    self._forget(replaced)
                return
        except StoreFull:
            pass  # the rare path makes room, if it can
        finally:
            PyBuffer_Release(&view)
        self._put_rare(PyBytes_FromStringAndSize(k, n), value)

    def _save(self, bytes key, int space, value, bytes meta, int flags):
        cdef Py_buffer view
        if PyBytes_GET_SIZE(meta) > MF_MAX_META:
            raise ValueTooLarge(f"key {shown(key)}: its description has {len(meta)} bytes, at most {MF_MAX_META} fit")
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
        try:
            return self.save(key, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, view.buf, view.len,
                             PyBytes_AS_STRING(meta), PyBytes_GET_SIZE(meta), flags)
        finally:
            PyBuffer_Release(&view)

    cdef bint remove(self, object key, const char *k, Py_ssize_t n, int space, mf_replaced *replaced) except -1:
        cdef mf_op op
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef Py_ssize_t shard = self.pick(k, n, space)
        cdef int status, attempt = 0
        replaced.length = 0
        while True:
            link = <Link>self.links[shard]
            if link is None:
                status = MF_NEED_CONNECTION
            elif link.usable() != MF_OK:
                status = link.usable()
            elif link.mapped:
                with nogil:
                    mf_op_begin(&op, &link.memory, link.timeout_ns)
                    op.space = space
                    status = mf_delete(&op, k, n, replaced)
                    mf_op_end(&op)
            else:
                stream = mf_pool_take(link.pool)
                if stream is NULL:
                    status = MF_NEED_CONNECTION
                else:
                    with nogil:
                        clear(&request, MF_DELETE, space)
                        request.key_len = n
                        status = mf_ask(stream, &request, k, NULL, NULL)
                        if status == MF_OK:
                            status = mf_pull_reply(stream, &pull)
                        if status == MF_OK:
                            status = mf_pull_replaced(stream, &pull, replaced)
                        mf_pool_give(link.pool, stream)
            if status == MF_OK or status == MF_ABSENT:
                break
            attempt += 1
            self.mend(shard, status, attempt, key)
        return status == MF_OK

    def delete(self, key):
        cdef const char *k
        cdef Py_ssize_t n
        cdef mf_replaced replaced
        key_bytes(key, &k, &n)
        there = self.remove(key, k, n, 0, &replaced)
        if replaced.length:
            self._forget(manifest_of(&replaced))
        return there

    def _remove(self, bytes key, int space):
        cdef mf_replaced replaced
        there = self.remove(key, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), space, &replaced)
        return there, manifest_of(&replaced) if replaced.length else None

    # --- many

    def get_many(self, keys):
        cdef list wanted = list(keys)
        cdef list values = [None] * len(wanted)
        cdef Py_ssize_t i
        cdef dict by_shard = {}
        cdef const char *k
        cdef Py_ssize_t n
        for i in range(len(wanted)):
            key_bytes(wanted[i], &k, &n)
            shard = self.pick(k, n, 0)
            link = self.links[shard]
            if link is None or (<Link>link).mapped:
                values[i] = self.get_or_none(wanted[i])
            else:
                by_shard.setdefault(shard, []).append(i)
        for shard, indices in by_shard.items():
            self.pipeline_gets(shard, indices, wanted, values)
        return values

    cdef object get_or_none(self, object key):
        cdef const char *k
        cdef Py_ssize_t n
        cdef found_t found
        key_bytes(key, &k, &n)
        value = self.fetch(key, k, n, 0, &found)
        if value is not None and found.flags & RARE:
            return self._unpack(PyBytes_FromStringAndSize(k, n), value, meta_of(&found), found.flags)
        return value

    cdef int pipeline_gets(self, Py_ssize_t shard, list indices, list keys, list values) except -1:
        """One window of requests after the other; what a broken link leaves is asked for singly."""
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef const char *k
        cdef Py_ssize_t n, first = 0, end, i, window
        cdef int status
        cdef bytes value
        while first < len(indices):
            link = <Link>self.links[shard]
            stream = NULL
            if link is not None and link.usable() == MF_OK and not link.mapped:
                stream = mf_pool_take(link.pool)
            if stream is NULL:
                values[<Py_ssize_t>indices[first]] = self.get_or_none(keys[<Py_ssize_t>indices[first]])
                first += 1
                continue
            try:
                end = first
                window = 0
                status = MF_OK
                while status == MF_OK and end < len(indices) and end - first < MF_WINDOW_COUNT:
                    key_bytes(keys[<Py_ssize_t>indices[end]], &k, &n)
                    window += sizeof(request) + n
                    if window > MF_WINDOW and end > first:
                        break
                    clear(&request, MF_GET, 0)
                    request.key_len = n
                    status = mf_ask(stream, &request, k, NULL, NULL)
                    end += 1
                while first < end and status == MF_OK:
                    with nogil:
                        status = mf_pull_reply(stream, &pull)
                    i = indices[first]
                    if status == MF_OK:
                        value = None
                        value = self.pull_value(link, stream, &pull, &status)
                        if status == MF_OK and pull.reply.flags & RARE:
                            # Unpacking may need this shard: later, when the stream is ours no more.
                            break
                        if status == MF_OK:
                            values[i] = value
                    elif status == MF_ABSENT:
                        status = MF_OK
                    if status == MF_OK:
                        first += 1
            except BaseException:
                abandon(stream)
                raise
            finally:
                if first < end:
                    abandon(stream)
                mf_pool_give(link.pool, stream)
            if first < end:
                values[<Py_ssize_t>indices[first]] = self.get_or_none(keys[<Py_ssize_t>indices[first]])
                first += 1

    def put_many(self, items):
        cdef list pairs = list(items.items()) if hasattr(items, "items") else list(items)
        cdef dict by_shard = {}
        cdef const char *k
        cdef Py_ssize_t n
        for key, value in pairs:
            key_bytes(key, &k, &n)
            shard = self.pick(k, n, 0)
            link = self.links[shard]
            if (
                link is None or (<Link>link).mapped or not self.plain or type(value) is not bytes
                or len(value) > MF_WINDOW
            ):
                # Nothing to gain, or not small. What came before for the same shard goes first: a key
                # that stands twice keeps its last value.
                if shard in by_shard:
                    self.pipeline_puts(shard, by_shard.pop(shard))
                self.put(key, value)
            else:
                by_shard.setdefault(shard, []).append((key, value))
        for shard, some in by_shard.items():
            self.pipeline_puts(shard, some)

    cdef int pipeline_puts(self, Py_ssize_t shard, list pairs) except -1:
        cdef mf_request request
        cdef mf_replaced replaced
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef const char *k
        cdef Py_ssize_t n, first = 0, end, window
        cdef int status
        cdef list manifests = []
        while first < len(pairs):
            link = <Link>self.links[shard]
            stream = NULL
            if link is not None and link.usable() == MF_OK and not link.mapped:
                stream = mf_pool_take(link.pool)
            if stream is NULL:
                key, value = pairs[first]
                self.put(key, value)
                first += 1
                continue
            try:
                end = first
                window = 0
                status = MF_OK
                while status == MF_OK and end < len(pairs) and end - first < MF_WINDOW_COUNT:
                    key, value = pairs[end]
                    key_bytes(key, &k, &n)
                    window += sizeof(request) + n + len(value)
                    if window > MF_WINDOW and end > first:
                        break
                    clear(&request, MF_PUT, 0)
                    self.writer += 1
                    request.a = self.writer
                    request.key_len = n
                    request.value_len = len(value)
                    status = mf_ask(stream, &request, k, NULL, PyBytes_AS_STRING(value))
                    end += 1
                while first < end and status == MF_OK:
                    with nogil:
                        status = mf_pull_reply(stream, &pull)
                        if status == MF_OK:
                            status = mf_pull_replaced(stream, &pull, &replaced)
                    if status == MF_OK:
                        first += 1
                        if replaced.length:
                            manifests.append(manifest_of(&replaced))
            except BaseException:
                abandon(stream)
                raise
            finally:
                if first < end:
                    abandon(stream)
                mf_pool_give(link.pool, stream)
            for manifest in manifests:
                self._forget(manifest)
            manifests.clear()
            if first < end:
                key, value = pairs[first]
                self.put(key, value)  # raises what the matter is, or mends the link
                first += 1

    def _scan(self, Py_ssize_t shard, uint64_t cursor, int space):
        cdef mf_op op
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef size_t room = MF_GROUP * (16 + MF_MAX_KEY), length = 0
        cdef bytes out = PyBytes_FromStringAndSize(NULL, room)
        cdef uint8_t *data = <uint8_t *>PyBytes_AS_STRING(out)
        cdef uint64_t next_ = cursor
        cdef int status, attempt = 0
        if not 0 <= shard < len(self.links):
            raise IndexError(shard)
        while True:
            link = <Link>self.links[shard]
            next_ = cursor
            if link is None:
                status = MF_NEED_CONNECTION
            elif link.usable() != MF_OK:
                status = link.usable()
            elif link.mapped:
                with nogil:
                    mf_op_begin(&op, &link.memory, link.timeout_ns)
                    op.space = space
                    status = mf_scan(&op, &next_, data, room, &length)
                    mf_op_end(&op)
            else:
                stream = mf_pool_take(link.pool)
                if stream is NULL:
                    status = MF_NEED_CONNECTION
                else:
                    with nogil:
                        clear(&request, MF_SCAN, space)
                        request.a = cursor
                        status = mf_ask(stream, &request, NULL, NULL, NULL)
                        if status == MF_OK:
                            status = mf_pull_reply(stream, &pull)
                        if status == MF_OK:
                            length = pull.reply.value_len
                            next_ = pull.reply.a
                            if length > room:
                                abandon(stream)
                                status = MF_BAD
                            else:
                                status = mf_pull_bytes(stream, data, length)
                        mf_pool_give(link.pool, stream)
            if status == MF_OK:
                return next_, records(data, length)
            attempt += 1
            self.mend(shard, status, attempt, b"")


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


cdef extern from *:
    """
    /* Bytes of a reply are still in the stream: it can't be used for another request. */
    static void mf_abandon(struct mf_stream *stream) { stream->error = -1; }
    """
    void abandon "mf_abandon"(mf_stream *stream) noexcept nogil


cdef int writable(object buffer, Py_buffer *view) except -1:
    try:
        PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    except (BufferError, TypeError) as error:
        raise UsageError(f"cannot write into a {type(buffer).__name__}: {error}") from None
    return 0


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
        if not (0 <= offset and 0 <= length and offset + length <= self.size):
            raise UsageError(f"bytes {offset} to {offset + length} are not in this region of {self.size} bytes")
        return 0

    cdef int run(self, int verb, uint64_t offset, char *data, uint64_t length, uint64_t b, uint64_t c,
                 uint64_t *before) except -1:
        cdef mf_op op
        cdef mf_request request
        cdef mf_pull pull
        cdef mf_stream *stream
        cdef Link link
        cdef int status, attempt = 0
        while True:
            link = <Link>self.link
            if link is None:
                status = MF_NEED_CONNECTION
            elif link.usable() != MF_OK:
                status = link.usable()
            elif link.mapped:
                with nogil:
                    mf_op_begin(&op, &link.memory, link.timeout_ns)
                    if verb == MF_READ:
                        status = mf_region_read(&op, offset, data, length)
                    elif verb == MF_WRITE:
                        status = mf_region_write(&op, offset, data, length)
                    elif verb == MF_SWAP:
                        status = mf_region_swap(&op, offset, b, c, before)
                    else:
                        status = mf_region_add(&op, offset, c, before)
                    mf_op_end(&op)
            else:
                stream = mf_pool_take(link.pool)
                if stream is NULL:
                    status = MF_NEED_CONNECTION
                else:
                    with nogil:
                        clear(&request, verb, 0)
                        request.value_len = length
                        request.a = offset
                        request.b = b
                        request.c = c
                        status = mf_ask(stream, &request, NULL, NULL, data)
                        if status == MF_OK:
                            status = mf_pull_reply(stream, &pull)
                        if status == MF_OK:
                            before[0] = pull.reply.a
                            if verb == MF_READ:
                                status = mf_pull_bytes(stream, data, length)
                        mf_pool_give(link.pool, stream)
            if status == MF_OK:
                return 0
            if status == MF_TIMEOUT:
                raise DeadlineExceeded(f"offset {offset}: the memory function did not answer in time")
            if status == MF_BAD:
                raise ProtocolError(f"offset {offset}: the memory function refused the request")
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
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except (BufferError, TypeError) as error:
            raise UsageError(f"cannot write a {type(data).__name__}: {error}") from None
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

