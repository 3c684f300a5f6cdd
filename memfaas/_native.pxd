# cython: language_level=3
"""What _native.pyx calls in memfaas/native, and the layout of its classes."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "memfaas.h" nogil:
    enum:
        MF_SHARD, MF_REGION
        MF_MIN_SHARD, MF_MAX_KEY, MF_MAX_META, MF_MAX_MANIFEST, MF_MANIFEST
        MF_STATE_SERVING, MF_STATE_FROZEN, MF_STATE_REVOKED, MF_PARTICIPANTS
        MF_OK, MF_ABSENT, MF_FULL, MF_TOO_LARGE, MF_SMALL_BUFFER, MF_CORRUPT, MF_TIMEOUT, MF_WAIT, MF_BAD
        MF_CHANGED, MF_NOT_HERE, MF_DIFFERS, MF_TAG
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
        uint32_t state, registered
        mf_participant participants[1024]
    struct mf_memory:
        mf_header at
        mf_control *control
        size_t populated
        uint32_t generation
    struct mf_op:
        uint64_t value_len
        uint32_t chunks
        uint8_t flags
    int mf_get_copy(mf_op *op, void *into, void *meta)
    struct mf_replaced:
        uint32_t length
        uint8_t manifest[64]
    struct mf_copy:
        int fd
        int64_t deadline
        uint64_t bytes
        bint spill
        int64_t patience
    struct mf_stats_t "mf_stats":
        uint64_t keys, parts, used, size, free_spans, epoch, participants

    uint64_t mf_hash(const void *data, size_t length, uint64_t seed)
    uint64_t mf_hash_key(const void *key, size_t length, unsigned space)
    void mf_geometry(int kind, uint64_t size, mf_header *out)
    int mf_format(int data_fd, int control_fd, const mf_header *header, int state)
    int mf_map(mf_memory *memory, int data_fd, int control_fd, uint32_t participant)
    void mf_unmap(mf_memory *memory)
    int mf_populate(mf_memory *memory, size_t limit)
    int mf_attach(mf_memory *memory, uint32_t pid, uint64_t start_time, uint32_t *participant)
    uint32_t mf_revoke(mf_memory *memory)
    bint mf_freeze(mf_memory *memory)
    bint mf_thaw(mf_memory *memory)
    uint64_t mf_operations(mf_memory *memory)
    void mf_set_epoch(mf_memory *memory, uint64_t epoch)
    void mf_copy_all(mf_memory *memory)
    int mf_copy_written(mf_memory *memory, mf_copy *copy)
    bint mf_drain(mf_memory *memory, int64_t deadline)
    int mf_copy_rest(mf_memory *memory, mf_copy *copy)
    int mf_receive(mf_memory *memory, mf_copy *copy, int data_fd)
    bint mf_may_punch(mf_memory *memory, int64_t deadline)
    uint64_t mf_punch(mf_memory *memory, int data_fd, uint64_t limit, int64_t deadline)
    int mf_unpunch(mf_memory *memory, int data_fd)
    uint64_t mf_punched(mf_memory *memory)
    uint32_t mf_fork_generation()
    int64_t mf_now()
    int mf_stats_of "mf_stats"(mf_memory *memory, mf_stats_t *out)
    void mf_reap(mf_memory *memory, uint32_t participant)
    int mf_put_right(mf_memory *memory, int64_t deadline)

cdef extern from "wire.h" nogil:
    enum:
        MF_GET, MF_PUT, MF_READ, MF_WRITE, MF_SWAP, MF_ADD
        MF_WINDOW, MF_WINDOW_COUNT, MF_GROUP
        MF_SHM, MF_TCP, MF_VERBS
        MF_IMPATIENT, MF_PATIENT, MF_SURE
    struct mf_request:
        uint8_t verb, flags, space, conditional
        uint32_t key_len, meta_len
        uint64_t value_len, a, b, c
    struct mf_reply:
        uint8_t flags
        uint32_t meta_len
        uint64_t value_len
    struct mf_stream:
        int error
    struct mf_pull:
        mf_reply reply
    struct mf_change:
        uint64_t id
    struct mf_pool:
        pass
    struct mf_server:
        pass
    struct mf_end:
        pass
    struct mf_queue:
        pass
    struct mf_remote
    struct mf_link:
        int fabric
        bint closed
        int64_t timeout
        mf_memory memory
        mf_pool *pool
        mf_remote *remote
    struct mf_got:
        uint64_t value_len
        uint32_t meta_len
        uint8_t flags
    struct mf_putting:
        uint8_t space, flags
        bint conditional
        uint64_t expected
        bint constant
        const void *key
        const void *meta
        const void *value
        uint32_t key_len, meta_len
        uint64_t value_len
        mf_change change
        mf_replaced replaced

    mf_server *mf_server_new(mf_memory *memory)
    int mf_server_serve(mf_server *server, int fd, mf_end *end)
    int mf_server_connections(mf_server *server)
    void mf_server_cut(mf_server *server)
    bint mf_server_stop(mf_server *server, int64_t timeout_ns)
    void mf_server_free(mf_server *server)

    mf_pool *mf_pool_new(int64_t timeout_ns)
    int mf_pool_add(mf_pool *pool, int fd, mf_queue *queue)
    void mf_pool_give(mf_pool *pool, mf_stream *stream)
    void mf_pool_close(mf_pool *pool)
    void mf_pool_free(mf_pool *pool)
    void mf_number(mf_stream *stream, mf_request *request, mf_change *change)
    int mf_ask(mf_stream *stream, const mf_request *request, const void *key, const void *meta, const void *value)
    int mf_pull_reply(mf_stream *stream, mf_pull *pull)
    int mf_pull_value(mf_stream *stream, mf_pull *pull, void *into)
    int mf_pull_replaced(mf_stream *stream, mf_pull *pull, mf_replaced *replaced)

    int mf_link_get(mf_link *link, int patience, uint8_t space, const void *key, uint32_t key_len, mf_got *got)
    int mf_link_take(mf_link *link, mf_got *got, void *into, void *meta)
    void mf_link_leave(mf_link *link, mf_got *got)
    int mf_link_has(mf_link *link, bint patient, const void *key, uint32_t key_len)
    int mf_link_put(mf_link *link, bint patient, mf_putting *put)
    int mf_link_delete(mf_link *link, bint patient, mf_putting *put)
    int mf_link_scan(mf_link *link, uint8_t space, uint64_t *cursor, uint8_t *out, size_t room, size_t *length)
    int mf_link_stats(mf_link *link, mf_stats_t *out)
    int mf_link_region(mf_link *link, uint8_t verb, uint64_t offset, void *data, uint64_t length, uint64_t b,
                       uint64_t c, uint64_t *before)
    mf_stream *mf_link_stream(mf_link *link)
    enum:
        MF_WANTED_MOST
    struct mf_wanted:
        const void *key
        uint32_t key_len
        int status
    int mf_batch_put(mf_stream *stream, mf_request *request, const void *key, const void *value)
    int mf_batch_reply(mf_link *link, mf_stream *stream, mf_replaced *replaced)
    int mf_batch_get(mf_link *link, mf_stream *stream, mf_wanted *wanted, unsigned count)
    int mf_batch_open(mf_link *link, mf_stream *stream, const mf_wanted *one, mf_op *found)


cdef extern from "verbs.h" nogil:
    enum:
        MF_WHY, MF_LEND, MF_LANDING
    struct mf_device:
        char name[80]
    struct mf_remote:
        mf_device *device
        uint64_t refused
        int refusal
    struct mf_address:
        pass
    struct mf_welcome:
        pass
    mf_end *mf_end_new(mf_server *server, const char *device, const mf_address *peer, mf_welcome *welcome, char *why)
    void mf_end_free(mf_end *end)
    void mf_verbs_close(mf_server *server, const char *why)
    void mf_verbs_reopen(mf_server *server)
    int mf_verbs_connections(mf_server *server)
    bint mf_verbs_ahead_begin(mf_server *server)
    int mf_verbs_ahead(mf_server *server, char *why)
    mf_remote *mf_remote_new(const char *device, char *why)
    void mf_remote_free(mf_remote *remote)
    mf_queue *mf_queue_new(mf_remote *remote, mf_address *address, char *why)
    int mf_queue_connect(mf_queue *queue, const mf_welcome *welcome, char *why)
    int mf_queue_test(mf_queue *queue, int fd, int64_t deadline)
    void mf_queue_free(mf_queue *queue)


cdef struct attempts_t:
    # Of one operation.
    int repairs, corrupt, changed

cdef struct found_t:
    # What came with a value.
    int flags
    uint32_t meta_len
    char meta[1024]

cdef enum:
    KEEP_GIL = 16384  # bytes: copying more takes longer than letting the GIL go and coming back
    RARE = 3          # FLAG_LZ4 | FLAG_MANIFEST: the store has to unpack the value
    PIECE = 67108864  # bytes of a region in one request
