/* What the bytes of a lease's memory mean.
 *
 * Two memfds. DATA moves with the lease and is taken away by a revoke:
 *
 *     header page | index: groups of 16 slots | heap: spans of 256 KiB        (a shard)
 *     header page | the user's bytes                                          (a region)
 *
 * CONTROL is made afresh on every donor and never truncated: state, locks, pins, participants, and
 * the heap's bitmaps. All positions are offsets from the start of DATA.
 *
 * Every process that maps the memory can write all of it, so nobody trusts what it reads here:
 * geometry is copied out once and checked (memory.c), offsets and lengths are checked at each use.
 */
#ifndef MEMFAAS_LAYOUT_H
#define MEMFAAS_LAYOUT_H

#include <stdatomic.h>
#include <stdint.h>

#define MF_MAGIC 0x3173616166656d6dULL
#define MF_FORMAT 3u
#define MF_PAGE 4096u
#define MF_HUGE_PAGE (2u << 20)
#define MF_SPAN (256u << 10)
#define MF_SEGMENT (64u << 10) /* bytes under one checksum of a large value */
#define MF_INLINE (64u << 10)  /* a block up to this size holds its value itself */
#define MF_MIN_BLOCK 128u
#define MF_GRAIN 64u /* blocks lie on this */
#define MF_GROUP 16u
#define MF_STRIPES 256u
#define MF_PINS 512u
#define MF_PARTICIPANTS 1024u
#define MF_WRITERS 4096u
#define MF_REMEMBERED 32u /* operations of a connection */
#define MF_SPAN_WORDS (MF_SPAN / MF_MIN_BLOCK / 64u)
#define MF_CLASSES 40 /* at most; class 0 is "unassigned" */
#define MF_MAX_KEY 65536u
#define MF_MAX_META 1024u
#define MF_MAX_PART (16u << 20)
#define MF_MAX_SEGMENTS (MF_MAX_PART / MF_SEGMENT)
#define MF_MAX_CHUNKS (MF_MAX_SEGMENTS + 1)
#define MF_MIN_SHARD (4u << 20)

enum mf_kind { MF_SHARD = 1, MF_REGION = 2 };

struct mf_header {
    uint64_t magic;
    uint32_t format;
    uint32_t kind;
    uint8_t lease[16];
    uint8_t store[16];
    uint64_t epoch;
    uint64_t shard;
    uint64_t size; /* usable bytes: of the heap, or of the region */
    uint64_t data_bytes;
    uint64_t control_bytes;
    uint64_t groups;
    uint64_t heap; /* offset; for a region, of the user's first byte */
    uint64_t spans;
    uint64_t part_size;
    uint64_t seed; /* of the sums of block heads: else bytes of a value could pass for a block */
};

/* What an index is made of; see index.h. */
typedef _Atomic uint64_t mf_slot;

/* A head block, followed by key, meta, and then the value itself (chunks == 0), or, 8-byte aligned,
 * one checksum per segment and the table of chunks. */
struct mf_block {
    uint64_t hash;     /* of the key */
    uint64_t version;  /* grows with every change of keys of this stripe */
    uint64_t checksum; /* of meta and value, or of meta, checksums and table */
    uint64_t value_len;
    uint32_t key_len;
    uint16_t meta_len;
    uint8_t flags; /* the client's: compressed, manifest, array */
    uint8_t space;
    uint32_t chunks;
    uint32_t class_;
    uint64_t header_sum; /* of what is before it, with the seed of the shard */
    uint64_t linked;     /* the version while the block's slot leads here, else something else (shard.c) */
};
_Static_assert(sizeof(struct mf_block) == 64, "block header");

struct mf_chunk {
    uint64_t offset;
    uint32_t length;
    uint32_t class_;
};

enum mf_state { MF_STATE_SERVING = 1, MF_STATE_FROZEN = 2, MF_STATE_REVOKED = 3 };

/* A lock whose holder is known by participant, so that the reaper can open it when that one died. */
struct mf_stripe {
    _Atomic uint32_t lock;
    uint32_t pad;
    _Atomic uint64_t version;
} __attribute__((aligned(64)));

/* One running operation, and how many this place has seen: a measure of how busy the memory is.
 * Invariant: while `word` is set to epoch e, the reclamation epoch is at most e + 1, so nothing that
 * was reachable when it was set is reused. `retiring` names the head block that is being unlinked;
 * the reaper completes it before it clears `word`. */
struct mf_pin {
    _Atomic uint64_t word; /* epoch << 16 | participant + 1; 0 is free */
    _Atomic uint64_t retiring;
    _Atomic uint64_t uses;
} __attribute__((aligned(64)));

/* What one tcp connection has changed, so that a client whose connection broke can ask whether its last
 * operations took effect. `done`: the number of the newest one << 32 | a bit for each of the 32 newest.
 * While `pending` is set, operation `pending` is about to link `block` (or, if `unlinks`, to unlink it). */
struct mf_writer {
    _Atomic uint64_t id; /* 0: free; no two records have the same */
    _Atomic uint64_t done;
    _Atomic uint32_t pending;
    _Atomic uint32_t unlinks;
    _Atomic uint64_t block;
    _Atomic int64_t used; /* last, by mf_now; the least of them is given to another connection first */
} __attribute__((aligned(64)));

struct mf_participant {
    _Atomic uint32_t state; /* 0 free, 1 attached */
    uint32_t pid;
    uint64_t start_time;
};

/* Invariants: only the holder changes class_, used and alloc. A span that nobody holds has exactly
 * those alloc bits set whose blocks are linked from the index or are in limbo. limbo bits are set by
 * anyone (after `stamp`), and cleared by the holder once the epoch is at least stamp + 2. */
struct mf_span {
    _Atomic uint32_t holder; /* participant + 1, or 0 */
    _Atomic uint32_t class_;
    uint32_t used;
    uint32_t cursor;
    _Atomic uint64_t stamp;
    uint64_t pad;
    _Atomic uint64_t alloc[MF_SPAN_WORDS]; /* atomic for those who only count */
    _Atomic uint64_t limbo[MF_SPAN_WORDS];
} __attribute__((aligned(64)));

struct mf_control_head {
    uint64_t magic;
    uint64_t format;
};

struct mf_control {
    struct mf_control_head head;
    _Atomic uint32_t state __attribute__((aligned(64)));
    _Atomic uint32_t registered; /* a network device may reach DATA, so truncating it frees nothing */
    _Atomic uint32_t atomics;    /* enum mf_atomics */
    _Atomic uint64_t epoch __attribute__((aligned(64)));
    _Atomic uint32_t pin_top; /* no pin at or above this index was ever used */
    uint32_t pad;
    struct mf_stripe stripes[MF_STRIPES];
    struct mf_pin pins[MF_PINS];
    struct mf_participant participants[MF_PARTICIPANTS];
    struct mf_writer writers[MF_WRITERS];
    /* And then the hints: MF_CLASSES bitmaps with a bit for each span. And then a byte for each MF_SPAN
     * of DATA: MF_EVER when it was ever written, and MF_DIRTY when since it was last copied (move.c). */
    struct mf_span spans[];
};

#define MF_EVER 1u
#define MF_DIRTY 2u

#endif
