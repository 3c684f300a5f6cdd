/* The native core's own interface: what _native.pyx and the C files call of each other. */
#ifndef MEMFAAS_H
#define MEMFAAS_H

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

#include "layout.h"

enum mf_status {
    MF_OK = 0,
    MF_ABSENT,
    MF_FULL,
    MF_TOO_LARGE,
    MF_SMALL_BUFFER,
    MF_CORRUPT,
    MF_TIMEOUT,
    MF_WAIT,            /* an impatient operation would have to wait */
    MF_BAD,             /* arguments, or a frame, that break the rules */
    MF_CHANGED,         /* while it was read: read it again */
    MF_NOT_HERE,        /* atomics of a region that another side has (region.c) */
    MF_DIFFERS,         /* a conditional change: what is there has another tag */
    MF_NEED_CONNECTION, /* the rest: the link can't, mend it and try again */
    MF_BROKEN,
    MF_REVOKED,
    MF_FROZEN,
    MF_STALE,
};

/* --- hash.c ---------------------------------------------------------------------------------- */

uint64_t mf_hash(const void *data, size_t length, uint64_t seed); /* XXH3, 64 bits */
/* Copies, and returns mf_hash(into, length, 0). `past_cache`: see hash_copy.h. */
uint64_t mf_hash_copy(void *into, const void *from, size_t length, bool past_cache);
/* Of everything that identifies a key. */
static inline uint64_t mf_hash_key(const void *key, size_t length, unsigned space) {
    return mf_hash(key, length, space);
}

/* --- guard.c: a revoked mapping is a status, not a SIGBUS death ---------------------------------- */

struct mf_guard {
    sigjmp_buf jump;
    const char *low, *high; /* addresses whose SIGBUS is ours */
    struct mf_guard *outer;
};
void mf_guard_install(void); /* chains to the handler that was there */
extern _Thread_local struct mf_guard *mf_guard_top;
/* Runs the statement; when the mapping [low, low + size) is cut meanwhile, runs `cut` instead of the rest. */
#define MF_GUARDED(low_, size_, body, cut)                                     \
    do {                                                                       \
        struct mf_guard guard_ = {.low = (const char *)(low_),                 \
                                  .high = (const char *)(low_) + (size_),      \
                                  .outer = mf_guard_top};                      \
        if (sigsetjmp(guard_.jump, 0) == 0) {                                  \
            mf_guard_top = &guard_;                                            \
            __asm__ volatile("" ::: "memory");                                 \
            body;                                                              \
            __asm__ volatile("" ::: "memory");                                 \
            mf_guard_top = guard_.outer;                                       \
        } else {                                                               \
            mf_guard_top = guard_.outer;                                       \
            cut;                                                               \
        }                                                                      \
    } while (0)

/* --- memory.c ------------------------------------------------------------------------------------ */

struct mf_memory {
    uint8_t *data;
    struct mf_control *control;
    _Atomic uint64_t *hints; /* in the control memory: [class][word] */
    _Atomic uint8_t *written; /* likewise: [chunk of MF_SPAN bytes of DATA] */
    struct mf_header at;     /* the geometry, copied and checked */
    size_t hint_words;
    size_t control_bytes;
    uint32_t participant;
    uint32_t generation; /* of fork */
    size_t populated; /* as far as that is done, from the start of DATA */
    bool unlocked;
    _Atomic uint32_t cursor[MF_CLASSES]; /* span last used for a class, by this process */
};

void mf_geometry(enum mf_kind kind, uint64_t size, struct mf_header *out);
/* 0 or an errno. */
int mf_format(int data_fd, int control_fd, const struct mf_header *header, enum mf_state state);
int mf_map(struct mf_memory *memory, int data_fd, int control_fd, uint32_t participant);
void mf_unmap(struct mf_memory *memory);
int mf_populate(struct mf_memory *memory, size_t limit);
int mf_attach(struct mf_memory *memory, uint32_t pid, uint64_t start_time, uint32_t *participant);
/* Revoked is for ever: whoever freezes or thaws may be late, and then changes nothing. */
uint32_t mf_revoke(struct mf_memory *memory); /* returns the state before */
bool mf_freeze(struct mf_memory *memory);     /* from serving to frozen; false: it was not serving */
bool mf_thaw(struct mf_memory *memory);       /* and back; false: it was not frozen */
uint64_t mf_operations(struct mf_memory *memory); /* so far; about */
uint32_t mf_fork_generation(void);

/* --- clock and waiting ----------------------------------------------------------------------------- */

int64_t mf_now(void); /* CLOCK_MONOTONIC, ns */
void mf_nap(int64_t ns);
/* Waits while *word == value, until the deadline. */
void mf_futex_wait(_Atomic uint32_t *word, uint32_t value, int64_t deadline);
void mf_futex_wake(_Atomic uint32_t *word, int count);

/* --- operations: pins.c, heap.c, shard.c, region.c -------------------------------------------------- */

#define MF_MAX_HELD (MF_MAX_CHUNKS + 1)

/* One operation on mapped memory. What it holds in the control memory stands in volatile fields, for
 * the way out when the mapping is cut under it. */
struct mf_op {
    struct mf_memory *memory;
    int64_t timeout;  /* ns; 0: impatient, MF_WAIT instead of waiting */
    int64_t deadline; /* 0 until something has to be waited for */
    volatile int pin;    /* index, or -1 */
    volatile int stripe; /* locked one, or -1 */
    volatile uint32_t held_count;
    volatile uint32_t held[MF_MAX_HELD];

    uint64_t hash;
    uint8_t space;
    /* what a get found */
    const struct mf_block *block;
    uint64_t value_len;
    uint32_t key_len;
    uint32_t meta_len;
    uint8_t flags;
    uint32_t chunks; /* 0: inline */
    uint32_t segments;
    uint64_t checksum;
    /* what a put is writing, or a get reading: pieces of the value, in order */
    uint32_t pieces;
    struct iovec piece[MF_MAX_CHUNKS];
    uint64_t sums[MF_MAX_SEGMENTS]; /* one for each segment of a chunked value */
    const uint8_t *meta;
    uint64_t head; /* offset of the new block */
    uint32_t head_class;
    struct mf_writer *writer; /* of the connection that asked for it, or NULL */
    uint32_t number;          /* its number there */
    uint64_t expected;        /* of a conditional change */
    bool conditional;
    uint8_t piece_class[MF_MAX_CHUNKS];
};

void mf_op_begin(struct mf_op *op, struct mf_memory *memory, int64_t timeout_ns);
void mf_op_end(struct mf_op *op); /* lets go of all that it holds */
int64_t mf_due(struct mf_op *op);

int mf_pin(struct mf_op *op);
void mf_unpin(struct mf_op *op);
void mf_repin(struct mf_op *op); /* the operation holds no reference: renew the pin */
bool mf_advance(struct mf_memory *memory);

int mf_lock(struct mf_op *op, uint32_t stripe);
void mf_unlock(struct mf_op *op);

unsigned mf_class_of(size_t size); /* 0: none is large enough */
uint32_t mf_class_size(unsigned class_);
uint64_t mf_alloc(struct mf_op *op, unsigned class_);
void mf_unalloc(struct mf_op *op, uint64_t offset);
void mf_retire(struct mf_memory *memory, uint64_t offset);
void mf_release(struct mf_op *op);
void mf_span_settle(struct mf_memory *memory, uint32_t span); /* by the holder: hints, and let go */
bool mf_span_hold(struct mf_memory *memory, uint32_t span);
void mf_heap_stats(struct mf_memory *memory, uint64_t *used, uint64_t *free_spans);

/* A conditional put or delete takes effect only if what is under the key has `expected` as its tag: the 8 bytes that
 * are its meta (0: there must be nothing). Whoever sees to it that no two values of a key have the same tag may
 * read, change and put back as if nobody else were there: MF_DIFFERS says that somebody was. */
#define MF_TAG 8u

#define MF_MANIFEST 2u /* flag: the value lists parts (memfaas.client.parts) */
#define MF_MAX_MANIFEST 64u

/* The manifest that a put or delete removed, for its parts to be forgotten. */
struct mf_replaced {
    uint32_t length; /* 0: what was there, if anything, was none */
    uint8_t manifest[MF_MAX_MANIFEST];
};

/* A get pins until mf_op_end; op->meta and op->piece then point into the shard. */
int mf_get(struct mf_op *op, const void *key, uint32_t key_len);
bool mf_open_block(struct mf_op *op, const struct mf_block *block, uint64_t room); /* fills op, as a get does */
/* Copies the value (and meta, if asked) out, then checks it: MF_CORRUPT. */
int mf_get_copy(struct mf_op *op, void *into, void *meta);

/* A put of a value that comes from elsewhere, and is not inline: the caller fills the whole spans in
 * op->piece, perhaps unpinned; reserves the rest and fills that; fills op->sums; and commits. */
int mf_put_reserve_spans(struct mf_op *op, uint32_t key_len, uint32_t meta_len, uint64_t value_len);
int mf_put_reserve_rest(struct mf_op *op);
int mf_put_commit(struct mf_op *op, const void *key, const void *meta, uint8_t flags,
                  struct mf_replaced *replaced);
void mf_put_abort(struct mf_op *op);
/* All of it, for a value in this process. */
int mf_put(struct mf_op *op, const void *key, uint32_t key_len, const void *meta, uint32_t meta_len,
           const void *value, uint64_t value_len, uint8_t flags, struct mf_replaced *replaced);

int mf_delete(struct mf_op *op, const void *key, uint32_t key_len, struct mf_replaced *replaced);

uint64_t mf_value_sum(const void *meta, size_t meta_len, const void *value, size_t length);
bool mf_is_inline(uint64_t key_len, uint64_t meta_len, uint64_t value_len);
uint32_t mf_segments_of(uint64_t value_len);

/* One batch of the keys of a space, as records {u32 key_len, u32 flags, u64 value_len, key}. */
int mf_scan(struct mf_op *op, uint64_t *cursor, uint8_t *out, size_t room, size_t *length);

struct mf_stats {
    uint64_t keys, parts, used, size, free_spans, epoch, participants;
};
int mf_stats(struct mf_memory *memory, struct mf_stats *out);

/* Regions: offsets of the user. */
int mf_region_range(struct mf_memory *memory, uint64_t offset, uint64_t length);
void mf_region_written(struct mf_op *op, uint64_t offset, uint64_t length); /* still pinned */
int mf_region_read(struct mf_op *op, uint64_t offset, void *into, uint64_t length);
int mf_region_write(struct mf_op *op, uint64_t offset, const void *data, uint64_t length);
int mf_region_swap(struct mf_op *op, uint64_t offset, uint64_t expected, uint64_t new_, uint64_t *before);
int mf_region_add(struct mf_op *op, uint64_t offset, uint64_t amount, uint64_t *before);
/* MF_OK: the side has the atomics of the region. */
enum mf_atomics { MF_ATOMICS_NOBODY, MF_ATOMICS_CPU, MF_ATOMICS_DEVICE };
int mf_region_claim(struct mf_memory *memory, enum mf_atomics side);
bool mf_region_release(struct mf_memory *memory); /* by the device, if it has them */

/* writers.c: which operations of a connection took effect. One thread at a time works for a writer. */
struct mf_writer *mf_writer_open(struct mf_memory *memory, uint64_t id, const bool *in_use);
void mf_writer_intend(struct mf_op *op, uint64_t block, bool unlinks);
void mf_writer_done(struct mf_op *op, bool happened);
bool mf_writer_asked(struct mf_memory *memory, uint64_t id, uint32_t number);
void mf_writers_recover(struct mf_memory *memory); /* of a killed function, before its pins clear */

/* For the reaper. */
#define MF_REAPER 0xffffu  /* holder of spans that are being put right */
#define MF_PUNCHED 0xfffeu /* of those whose memory the kernel has back (punch.c) */
bool mf_is_linked(struct mf_memory *memory, uint64_t offset);
void mf_relink(struct mf_memory *memory, uint32_t stripe);
void mf_retire_block(struct mf_memory *memory, uint64_t offset);
/* Sets a bit in linked[i * MF_SPAN_WORDS ...] for each block of span spans[i] that a slot leads to. */
int mf_mark_linked(struct mf_memory *memory, const uint32_t *spans, uint32_t count, uint64_t *linked,
                   int64_t deadline);
void mf_span_free_unlinked(struct mf_memory *memory, uint32_t span, const uint64_t *linked);
bool mf_in_limbo(struct mf_memory *memory, uint64_t offset);
unsigned mf_span_block(struct mf_memory *memory, uint64_t offset, uint32_t *span);

/* move.c. The writer of DATA notes where, after it wrote and before it unpins.
 *
 * Writer: bytes W, then mark loaded L, and stored D unless it is set. Copier: mark cleared C, fence, then bytes read R.
 * What must not be is that the mark stays clear although R missed W. There are two ways to that: L found the mark set
 * by somebody before C, so that there is no D; or D came before C in the order of the mark's changes. In both of them L
 * read something older than C. C and L are seq_cst, so L is before C in the one order S of all such operations (had C been
 * before L in S, L would have read C or something newer). W is before L in S if it is a seq_cst store itself, as that
 * of a slot is, or if a seq_cst fence stands between the two; so W is before the copier's fence in S, and R, which comes
 * after that, sees W. When L is relaxed this fails for a slot on machines (not x86) where a store may pass a later load.
 *
 * D may be relaxed: the last round of all comes after the drain, which has seen the pin cleared with release. */
static inline void mf_note_chunk(struct mf_memory *memory, uint64_t chunk) {
    if (atomic_load(&memory->written[chunk]) != (MF_EVER | MF_DIRTY))
        atomic_store_explicit(&memory->written[chunk], MF_EVER | MF_DIRTY, memory_order_relaxed);
}
static inline void mf_note_written(struct mf_memory *memory, uint64_t offset, uint64_t length) {
    atomic_thread_fence(memory_order_seq_cst);
    for (uint64_t chunk = offset / MF_SPAN; length && chunk <= (offset + length - 1) / MF_SPAN; chunk++)
        mf_note_chunk(memory, chunk);
}

/* One copy of a memory to another donor, over a connected socket. 0 or an errno from all of them. */
struct mf_copy {
    int fd;
    int64_t deadline;
    uint64_t bytes; /* of DATA, so far */
    bool spill;     /* receiving: to a file, which is not to fill the memory that it relieves */
    int64_t patience; /* sending: ns for which nothing at all is taken; 0: as long as there is time */
};
void mf_copy_all(struct mf_memory *memory); /* from here on everything counts as not copied yet */
int mf_copy_written(struct mf_memory *memory, struct mf_copy *copy);
bool mf_drain(struct mf_memory *memory, int64_t deadline); /* frozen: no operation is left */
int mf_copy_rest(struct mf_memory *memory, struct mf_copy *copy);
int mf_receive(struct mf_memory *memory, struct mf_copy *copy, int data_fd);
void mf_set_epoch(struct mf_memory *memory, uint64_t epoch);

/* punch.c: up to `limit` bytes of free spans back to the kernel, if there are any. */
bool mf_may_punch(struct mf_memory *memory, int64_t deadline);
uint64_t mf_punch(struct mf_memory *memory, int data_fd, uint64_t limit, int64_t deadline);
/* For a file, `data_fd`: not without its blocks. Or -1. 0, or the errno for which some stay punched. */
int mf_unpunch(struct mf_memory *memory, int data_fd);
uint64_t mf_punched(struct mf_memory *memory); /* bytes */
bool mf_sweep(struct mf_memory *memory, int64_t deadline); /* heap.c: empty spans become unassigned */
bool mf_take_unassigned(struct mf_memory *memory, uint32_t span, uint32_t holder);
void mf_span_adopt(struct mf_memory *memory, uint32_t span, unsigned class_, const uint64_t *alloc, bool held);

/* reap.c: what a dead participant left behind. */
void mf_reap(struct mf_memory *memory, uint32_t participant);
int mf_put_right(struct mf_memory *memory, int64_t deadline);

#endif
