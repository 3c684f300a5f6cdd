/* The key-value shard: index and blocks, on top of pins, locks and the heap.
 *
 * A get takes no lock: it loads one slot (that is where it takes effect) and reads a block that its
 * pin keeps alive. A put writes its blocks first, then under the lock of the key's stripe stores one
 * slot (that is where it takes effect), then retires what was there. A key's slot is in one of two
 * groups, and stays where it is until the key is deleted. Writers of different stripes may share a
 * group, so an empty slot is claimed by compare-and-swap; a full one only changes under its key's lock. */
#include <string.h>

#include "index.h"
#include "memfaas.h"

#define ALIGN8(n) (((n) + 7) & ~7ull)

/* --- finding ------------------------------------------------------------------------------------- */

static mf_slot *group_at(struct mf_memory *memory, uint64_t group) {
    return (mf_slot *)(memory->data + mf_group_offset(group));
}

static uint32_t stripe_of(uint64_t hash) { return (hash >> 16) % MF_STRIPES; }

/* The block's header as it is in the heap, or NULL for an offset that makes no sense: the reaper's come
 * from the control memory, and may be any number. */
static const struct mf_block *block_at(struct mf_memory *memory, uint64_t offset) {
    bool sense = offset % MF_GRAIN == 0 && mf_in_heap(&memory->at, offset, sizeof(struct mf_block));
    return sense ? (const struct mf_block *)(memory->data + offset) : NULL;
}

static const struct mf_block *matches(struct mf_op *op, uint64_t slot, const void *key, uint32_t key_len) {
    struct mf_memory *memory = op->memory;
    uint64_t offset = mf_slot_offset(slot);
    const struct mf_block *block = block_at(memory, offset);
    if (block && block->hash == op->hash && block->key_len == key_len && block->space == op->space &&
        mf_in_heap(&memory->at, offset, sizeof *block + key_len) && memcmp(block + 1, key, key_len) == 0)
        return block;
    return NULL;
}

static mf_slot *find(struct mf_op *op, const void *key, uint32_t key_len, uint64_t *slot, const struct mf_block **block) {
    struct mf_memory *memory = op->memory;
    mf_slot *group = group_at(memory, mf_home_group(&memory->at, op->hash));
    for (int turn = 0; turn < 2; turn++, group = group_at(memory, mf_other_group(&memory->at, op->hash)))
        for (unsigned i = 0; i < MF_GROUP; i++) {
            uint64_t value = atomic_load_explicit(&group[i], memory_order_acquire);
            if (mf_slot_fits(value, op->hash, op->space) && (*block = matches(op, value, key, key_len))) {
                *slot = value;
                return &group[i];
            }
        }
    return NULL;
}

static int start(struct mf_op *op, const void *key, uint32_t key_len) {
    op->hash = mf_hash_key(key, key_len, op->space);
    if (op->memory->at.kind != MF_SHARD || key_len > MF_MAX_KEY)
        return MF_BAD;
    return op->pin < 0 ? mf_pin(op) : MF_OK;
}

/* --- what a block holds ------------------------------------------------------------------------------ */

uint64_t mf_value_sum(const void *meta, size_t meta_len, const void *value, size_t length) {
    return mf_hash(value, length, meta_len ? mf_hash(meta, meta_len, 0) : 0);
}

uint32_t mf_segments_of(uint64_t value_len) { return (uint32_t)((value_len + MF_SEGMENT - 1) / MF_SEGMENT); }

bool mf_is_inline(uint64_t key_len, uint64_t meta_len, uint64_t value_len) {
    return value_len == 0 || sizeof(struct mf_block) + key_len + meta_len + value_len <= MF_INLINE;
}

static uint64_t table_sum(const void *meta, size_t meta_len, const void *sums, size_t length) {
    return mf_value_sum(meta, meta_len, sums, length);
}

/* The seed comes with the data when a lease moves, so what was mapped before has another one. */
static uint64_t head_sum(const struct mf_memory *memory, const struct mf_block *head) {
    uint64_t seed = memory->data ? ((const struct mf_header *)memory->data)->seed : memory->at.seed;
    return mf_hash(head, offsetof(struct mf_block, header_sum), seed);
}

/* Fills op from a block of which `room` bytes are here, believing nothing. */
bool mf_open_block(struct mf_op *op, const struct mf_block *block, uint64_t room) {
    struct mf_memory *memory = op->memory;
    struct mf_block head;
    memcpy(&head, block, offsetof(struct mf_block, linked));
    uint64_t at = sizeof head;
    if (head.header_sum != head_sum(memory, &head) || head.meta_len > MF_MAX_META ||
        head.key_len > MF_MAX_KEY || at + head.key_len + head.meta_len > room)
        return false;
    at += head.key_len;
    op->block = block;
    op->key_len = head.key_len;
    op->meta = (const uint8_t *)block + at;
    op->meta_len = head.meta_len;
    op->value_len = head.value_len;
    op->flags = head.flags;
    op->checksum = head.checksum;
    op->chunks = head.chunks;
    op->segments = 0;
    at += head.meta_len;
    if (head.chunks == 0) {
        op->pieces = 1;
        op->piece[0] = (struct iovec){(uint8_t *)block + at, head.value_len};
        return head.value_len <= MF_INLINE && head.value_len <= room - at;
    }
    at = ALIGN8(at);
    if (head.chunks > MF_MAX_CHUNKS || head.value_len > MF_MAX_PART)
        return false;
    op->segments = mf_segments_of(head.value_len);
    size_t length = op->segments * sizeof *op->sums + head.chunks * sizeof(struct mf_chunk);
    if (at + length > room)
        return false;
    const uint8_t *table = (const uint8_t *)block + at;
    memcpy(op->sums, table, op->segments * sizeof *op->sums);
    uint64_t total = 0;
    for (uint32_t i = 0; i < head.chunks; i++) {
        struct mf_chunk chunk;
        memcpy(&chunk, table + op->segments * sizeof *op->sums + i * sizeof chunk, sizeof chunk);
        bool last = i + 1 == head.chunks; /* segments do not cross chunks */
        if (!mf_in_heap(&memory->at, chunk.offset, chunk.length) || (!last && chunk.length % MF_SEGMENT) ||
            !chunk.length)
            return false;
        op->piece[i] = (struct iovec){memory->data + chunk.offset, chunk.length};
        total += chunk.length;
    }
    op->pieces = head.chunks;
    return total == head.value_len && head.checksum == table_sum(op->meta, op->meta_len, table, length);
}

/* The same for a block of the heap. */
static bool open_block(struct mf_op *op, const struct mf_block *block) {
    struct mf_memory *memory = op->memory;
    uint64_t offset = (uint64_t)((const uint8_t *)block - memory->data);
    return mf_open_block(op, block, memory->at.heap + memory->at.spans * MF_SPAN - offset);
}

/* --- get --------------------------------------------------------------------------------------------- */

int mf_get(struct mf_op *op, const void *key, uint32_t key_len) {
    int status = start(op, key, key_len);
    if (status != MF_OK)
        return status;
    bool good = false;
    MF_GUARDED(
        op->memory->data, op->memory->at.data_bytes,
        {
            uint64_t slot;
            const struct mf_block *block;
            if (!find(op, key, key_len, &slot, &block))
                status = MF_ABSENT;
            else
                good = open_block(op, block);
        },
        return MF_REVOKED);
    return status != MF_OK ? status : good ? MF_OK : MF_CORRUPT;
}

/* Copies an inline value; returns its mf_value_sum. */
static uint64_t copy_value(void *into, const void *from, size_t length, const void *meta, size_t meta_len) {
    if (!meta_len)
        return mf_hash_copy(into, from, length, false);
    memcpy(into, from, length);
    return mf_value_sum(meta, meta_len, into, length);
}

static bool copy_out(struct mf_op *op, uint8_t *into, void *meta) {
    if (meta)
        memcpy(meta, op->meta, op->meta_len);
    if (op->chunks == 0) {
        return op->checksum == copy_value(into, op->piece[0].iov_base, op->value_len, op->meta, op->meta_len);
    }
    uint32_t segment = 0;
    for (uint32_t i = 0; i < op->pieces; i++) {
        const uint8_t *from = op->piece[i].iov_base;
        for (size_t left = op->piece[i].iov_len; left;) {
            size_t count = left < MF_SEGMENT ? left : MF_SEGMENT;
            if (op->sums[segment++] != mf_hash_copy(into, from, count, false))
                return false;
            into += count;
            from += count;
            left -= count;
        }
    }
    return true;
}

int mf_get_copy(struct mf_op *op, void *into, void *meta) {
    bool good = false;
    MF_GUARDED(op->memory->data, op->memory->at.data_bytes, good = copy_out(op, into, meta), return MF_REVOKED);
    return good ? MF_OK : MF_CORRUPT;
}

/* --- put --------------------------------------------------------------------------------------------- */

static bool reserve_chunks(struct mf_op *op, uint64_t value_len, size_t largest) {
    struct mf_memory *memory = op->memory;
    for (uint64_t left = value_len; left;) {
        size_t count = left >= largest ? largest : left >= MF_SEGMENT ? MF_SEGMENT : left;
        unsigned class_ = mf_class_of(count);
        uint64_t offset = mf_alloc(op, class_);
        if (!offset)
            return false;
        op->piece[op->pieces] = (struct iovec){memory->data + offset, count};
        op->piece_class[op->pieces++] = (uint8_t)class_;
        left -= count;
    }
    return true;
}

void mf_put_abort(struct mf_op *op) {
    for (uint32_t i = 0; op->chunks && i < op->pieces; i++)
        mf_unalloc(op, (uint64_t)((uint8_t *)op->piece[i].iov_base - op->memory->data));
    if (op->head)
        mf_unalloc(op, op->head);
    op->head = 0;
    op->pieces = op->chunks = 0;
    mf_release(op);
}

static int begin_put(struct mf_op *op, uint32_t key_len, uint32_t meta_len, uint64_t value_len) {
    if (op->memory->at.kind != MF_SHARD || key_len > MF_MAX_KEY || meta_len > MF_MAX_META)
        return MF_BAD;
    if (value_len > op->memory->at.part_size)
        return MF_TOO_LARGE;
    op->key_len = key_len;
    op->meta_len = meta_len;
    op->value_len = value_len;
    op->pieces = op->chunks = op->segments = 0;
    return op->pin < 0 ? mf_pin(op) : MF_OK;
}

/* The whole spans of a value that is not inline: held for as long as a peer takes to fill them, which
 * bothers nobody, for there are no other blocks in them. */
int mf_put_reserve_spans(struct mf_op *op, uint32_t key_len, uint32_t meta_len, uint64_t value_len) {
    int status = begin_put(op, key_len, meta_len, value_len);
    if (status != MF_OK)
        return status;
    op->chunks = 1;
    if (reserve_chunks(op, value_len / MF_SPAN * MF_SPAN, MF_SPAN))
        return MF_OK;
    mf_put_abort(op);
    return MF_FULL;
}

static int reserve_head(struct mf_op *op) {
    op->chunks = op->pieces;
    op->segments = mf_segments_of(op->value_len);
    uint64_t size = ALIGN8(sizeof(struct mf_block) + op->key_len + op->meta_len);
    op->head_class = mf_class_of(size + op->segments * sizeof *op->sums + op->chunks * sizeof(struct mf_chunk));
    if ((op->head = mf_alloc(op, op->head_class)))
        return MF_OK;
    mf_put_abort(op);
    return MF_FULL;
}

int mf_put_reserve_rest(struct mf_op *op) {
    int status = op->pin < 0 ? mf_pin(op) : MF_OK;
    if (status == MF_OK && !reserve_chunks(op, op->value_len % MF_SPAN, MF_SEGMENT))
        status = MF_FULL;
    if (status == MF_OK)
        return reserve_head(op);
    mf_put_abort(op);
    return status;
}

static int reserve(struct mf_op *op, uint32_t key_len, uint32_t meta_len, uint64_t value_len) {
    int status = begin_put(op, key_len, meta_len, value_len);
    if (status != MF_OK)
        return status;
    if (mf_is_inline(key_len, meta_len, value_len)) {
        uint64_t size = sizeof(struct mf_block) + key_len + meta_len;
        op->head_class = mf_class_of(size + value_len);
        if (!(op->head = mf_alloc(op, op->head_class)))
            return MF_FULL;
        op->piece[0] = (struct iovec){op->memory->data + op->head + size, value_len};
        op->pieces = 1;
        return MF_OK;
    }
    /* Whole spans first; when none are left, what a fragmented heap may still have. */
    op->chunks = 1;
    if (!reserve_chunks(op, value_len, MF_SPAN)) {
        mf_put_abort(op);
        op->chunks = 1;
        if (!reserve_chunks(op, value_len, MF_SEGMENT)) {
            mf_put_abort(op);
            return MF_FULL;
        }
    }
    return reserve_head(op);
}

/* After the slot was stored, seq_cst (see mf_note_chunk). */
static void note_slot(struct mf_memory *memory, const mf_slot *slot) {
    mf_note_chunk(memory, (uint64_t)((const uint8_t *)slot - memory->data) / MF_SPAN);
}

/* Whether a conditional change may go on, under the stripe's lock. */
static bool is_as_expected(const struct mf_op *op, const struct mf_block *old) {
    uint64_t tag = 0;
    if (!op->conditional)
        return true;
    if (!old)
        return op->expected == 0;
    if (old->meta_len != MF_TAG || !mf_in_heap(&op->memory->at, (uint64_t)((const uint8_t *)old - op->memory->data),
                                               sizeof *old + old->key_len + MF_TAG))
        return false;
    memcpy(&tag, (const uint8_t *)(old + 1) + old->key_len, sizeof tag);
    return tag && tag == op->expected;
}

/* The slot for a new key: in the emptier of its groups, but at home while there is room to spare. */
static mf_slot *claim_empty(struct mf_op *op, uint64_t value) {
    mf_slot *groups[2] = {group_at(op->memory, mf_home_group(&op->memory->at, op->hash)),
                          group_at(op->memory, mf_other_group(&op->memory->at, op->hash))};
    unsigned used[2] = {0, 0};
    for (int g = 0; g < 2; g++)
        for (unsigned i = 0; i < MF_GROUP; i++)
            used[g] += atomic_load_explicit(&groups[g][i], memory_order_relaxed) != 0;
    int first = used[0] > MF_GROUP / 2 && used[1] < used[0];
    for (int turn = 0; turn < 2; turn++)
        for (unsigned i = 0; i < MF_GROUP; i++) {
            mf_slot *slot = &groups[first ^ turn][i];
            uint64_t none = 0;
            if (atomic_load_explicit(slot, memory_order_relaxed) == 0 &&
                atomic_compare_exchange_strong(slot, &none, value)) {
                note_slot(op->memory, slot);
                return slot;
            }
        }
    return NULL;
}

static void retire_block(struct mf_op *op, const struct mf_block *block, struct mf_replaced *replaced) {
    struct mf_memory *memory = op->memory;
    struct mf_op old; /* only what open_block fills */
    old.memory = memory;
    if (open_block(&old, block)) {
        if (replaced && old.flags & MF_MANIFEST && old.chunks == 0 && old.value_len <= MF_MAX_MANIFEST) {
            memcpy(replaced->manifest, old.piece[0].iov_base, old.value_len);
            replaced->length = (uint32_t)old.value_len;
        }
        for (uint32_t i = 0; old.chunks && i < old.pieces; i++)
            mf_retire(memory, (uint64_t)((uint8_t *)old.piece[i].iov_base - memory->data));
    }
    mf_retire(memory, (uint64_t)((const uint8_t *)block - memory->data));
}

/* `linked` is for those who read a block one-sided (verbs_get.c), without a pin that would keep it what it was. It
 * is the block's version only from after its slot was stored until before the slot is changed again, and no
 * two blocks of a key have the same. So who reads a block with the two alike has read what the slot led to at that
 * moment. (A writer that dies in between leaves them different, until the reaper comes to mf_relink.) */
static void set_linked(const struct mf_block *block, uint64_t version) {
    atomic_store_explicit((_Atomic uint64_t *)&block->linked, version, memory_order_release);
}

/* Under the stripe's lock: `retiring` tells the reaper what we are about to unlink. */
static void unlink_from(struct mf_op *op, mf_slot *slot, uint64_t value, const struct mf_block *old,
                        struct mf_replaced *replaced) {
    _Atomic uint64_t *retiring = &op->memory->control->pins[op->pin].retiring;
    atomic_store(retiring, (uint64_t)((const uint8_t *)old - op->memory->data));
    set_linked(old, 0);
    atomic_store(slot, value);
    note_slot(op->memory, slot);
    retire_block(op, old, replaced);
    atomic_store(retiring, 0);
}

static int commit(struct mf_op *op, const void *key, const void *meta, uint8_t flags, struct mf_replaced *replaced) {
    struct mf_memory *memory = op->memory;
    uint8_t *at = memory->data + op->head;
    struct mf_block head = {.hash = op->hash,
                            .value_len = op->value_len,
                            .checksum = op->checksum,
                            .key_len = op->key_len,
                            .meta_len = (uint16_t)op->meta_len,
                            .flags = flags,
                            .space = op->space,
                            .chunks = op->chunks,
                            .class_ = op->head_class};
    memcpy(at + sizeof head, key, op->key_len);
    if (op->meta_len) /* memcpy takes no NULL, even of no bytes */
        memcpy(at + sizeof head + op->key_len, meta, op->meta_len);
    if (op->chunks) {
        uint8_t *sums = memory->data + ALIGN8(op->head + sizeof head + op->key_len + op->meta_len);
        uint8_t *table = sums + op->segments * sizeof *op->sums;
        memcpy(sums, op->sums, op->segments * sizeof *op->sums);
        for (uint32_t i = 0; i < op->chunks; i++) {
            struct mf_chunk chunk = {(uint64_t)((uint8_t *)op->piece[i].iov_base - memory->data),
                                     (uint32_t)op->piece[i].iov_len, op->piece_class[i]};
            memcpy(table + i * sizeof chunk, &chunk, sizeof chunk);
        }
        head.checksum = table_sum(meta, op->meta_len, sums,
                                  op->segments * sizeof *op->sums + op->chunks * sizeof(struct mf_chunk));
    }
    int status = mf_lock(op, stripe_of(op->hash));
    if (status != MF_OK)
        return status;
    head.version = atomic_fetch_add_explicit(&memory->control->stripes[op->stripe].version, 1, memory_order_relaxed) + 1;
    head.header_sum = head_sum(memory, &head);
    memcpy(at, &head, sizeof head);
    uint64_t slot, value = mf_slot_of(op->hash, op->space, op->head_class, op->head);
    const struct mf_block *old;
    mf_slot *where = find(op, key, op->key_len, &slot, &old);
    if (!is_as_expected(op, where ? old : NULL)) {
        mf_unlock(op);
        return MF_DIFFERS;
    }
    mf_writer_intend(op, op->head, false);
    if (where)
        unlink_from(op, where, value, old, replaced);
    else if (!claim_empty(op, value))
        status = MF_FULL;
    if (status == MF_OK)
        set_linked((const struct mf_block *)at, head.version);
    mf_writer_done(op, status == MF_OK);
    mf_unlock(op);
    return status;
}

int mf_put_commit(struct mf_op *op, const void *key, const void *meta, uint8_t flags, struct mf_replaced *replaced) {
    replaced->length = 0;
    op->hash = mf_hash_key(key, op->key_len, op->space);
    int status = op->pin < 0 ? mf_pin(op) : MF_OK;
    if (status == MF_OK)
        MF_GUARDED(op->memory->data, op->memory->at.data_bytes,
                   status = commit(op, key, meta, flags, replaced), return MF_REVOKED);
    if (status != MF_OK)
        mf_put_abort(op);
    return status;
}

#define UNPINNED 4096u /* bytes that take longer to copy than it takes to pin again */
#define PAST_CACHE (4u << 20) /* a value larger than most shares of a last-level cache */

static void copy_in(struct mf_op *op, const void *meta, const uint8_t *value) {
    if (op->chunks == 0) {
        op->checksum = copy_value(op->piece[0].iov_base, value, op->value_len, meta, op->meta_len);
        return;
    }
    uint32_t segment = 0;
    for (uint32_t i = 0; i < op->pieces; i++) {
        uint8_t *to = op->piece[i].iov_base;
        for (size_t left = op->piece[i].iov_len; left;) {
            size_t count = left < MF_SEGMENT ? left : MF_SEGMENT;
            op->sums[segment++] = mf_hash_copy(to, value, count, op->value_len >= PAST_CACHE);
            to += count;
            value += count;
            left -= count;
        }
    }
}

int mf_put(struct mf_op *op, const void *key, uint32_t key_len, const void *meta, uint32_t meta_len,
           const void *value, uint64_t value_len, uint8_t flags, struct mf_replaced *replaced) {
    int status = reserve(op, key_len, meta_len, value_len);
    if (status != MF_OK)
        return status;
    /* The blocks are ours while we hold their spans. A pin would keep everybody's freed blocks from being
     * used again while they are still in the cache, for as long as we are not running. */
    if (value_len > UNPINNED)
        mf_unpin(op);
    MF_GUARDED(op->memory->data, op->memory->at.data_bytes, copy_in(op, meta, value), return MF_REVOKED);
    return mf_put_commit(op, key, meta, flags, replaced);
}

/* --- delete, scan, counts -------------------------------------------------------------------------------- */

static int delete(struct mf_op *op, const void *key, uint32_t key_len, struct mf_replaced *replaced) {
    int status = mf_lock(op, stripe_of(op->hash));
    if (status != MF_OK)
        return status;
    uint64_t slot;
    const struct mf_block *old;
    mf_slot *where = find(op, key, key_len, &slot, &old);
    if (!is_as_expected(op, where ? old : NULL)) {
        mf_unlock(op);
        return MF_DIFFERS;
    }
    if (where) {
        mf_writer_intend(op, (uint64_t)((const uint8_t *)old - op->memory->data), true);
        unlink_from(op, where, 0, old, replaced);
        mf_writer_done(op, true);
    }
    mf_unlock(op);
    return where ? MF_OK : MF_ABSENT;
}

int mf_delete(struct mf_op *op, const void *key, uint32_t key_len, struct mf_replaced *replaced) {
    replaced->length = 0;
    int status = start(op, key, key_len);
    if (status == MF_OK)
        MF_GUARDED(op->memory->data, op->memory->at.data_bytes, status = delete(op, key, key_len, replaced),
                   return MF_REVOKED);
    return status;
}

static bool scan_group(struct mf_op *op, uint64_t group, uint8_t *out, size_t room, size_t *length) {
    size_t at = *length;
    for (unsigned i = 0; i < MF_GROUP; i++) {
        uint64_t value = atomic_load_explicit(&group_at(op->memory, group)[i], memory_order_acquire);
        if (!value || mf_slot_space(value) != op->space)
            continue;
        const struct mf_block *block = block_at(op->memory, mf_slot_offset(value));
        if (!block || !open_block(op, block))
            continue;
        uint32_t key_len = op->key_len;
        if (room - at < 16 + (size_t)key_len)
            return false;
        uint32_t numbers[2] = {key_len, op->flags};
        memcpy(out + at, numbers, 8);
        memcpy(out + at + 8, &op->value_len, 8);
        memcpy(out + at + 16, block + 1, key_len);
        at += 16 + key_len;
    }
    *length = at;
    return true;
}

#define SCAN_GROUPS 1024 /* in one batch: a pin is not held for long */

/* `cursor` counts groups; a group of long keys that does not fit is told by MF_SMALL_BUFFER. */
int mf_scan(struct mf_op *op, uint64_t *cursor, uint8_t *out, size_t room, size_t *length) {
    struct mf_memory *memory = op->memory;
    *length = 0;
    if (memory->at.kind != MF_SHARD)
        return MF_BAD;
    int status = mf_pin(op);
    if (status != MF_OK)
        return status;
    uint64_t group = *cursor, end = group + SCAN_GROUPS < memory->at.groups ? group + SCAN_GROUPS : memory->at.groups;
    volatile uint64_t next = group;
    MF_GUARDED(
        memory->data, memory->at.data_bytes,
        {
            for (; group < end && scan_group(op, group, out, room, length); group++)
                next = group + 1;
        },
        return MF_REVOKED);
    if (next == *cursor && next < end)
        return MF_SMALL_BUFFER;
    *cursor = next < memory->at.groups ? next : 0;
    return MF_OK;
}

int mf_stats(struct mf_memory *memory, struct mf_stats *out) {
    memset(out, 0, sizeof *out);
    out->size = memory->at.size;
    out->epoch = memory->at.epoch;
    for (uint32_t i = 1; i < MF_PARTICIPANTS; i++)
        out->participants += atomic_load(&memory->control->participants[i].state) != 0;
    if (memory->at.kind != MF_SHARD)
        return MF_OK;
    volatile uint64_t keys = 0, parts = 0;
    MF_GUARDED(
        memory->data, memory->at.data_bytes,
        {
            mf_slot *slots = group_at(memory, 0);
            uint64_t counts[2];
            counts[0] = counts[1] = 0;
            for (uint64_t i = 0; i < memory->at.groups * MF_GROUP; i++) {
                uint64_t value = atomic_load_explicit(&slots[i], memory_order_relaxed);
                counts[mf_slot_space(value)] += value != 0;
            }
            keys = counts[0];
            parts = counts[1];
        },
        return MF_REVOKED);
    out->keys = keys;
    out->parts = parts;
    mf_heap_stats(memory, &out->used, &out->free_spans);
    return MF_OK;
}

/* --- for the reaper --------------------------------------------------------------------------------------- */

/* Of the keys of a stripe whose lock a dead one holds, so nobody else changes them; and as its pin is set still, no
 * block that a slot leads to now is used for anything else meanwhile. */
void mf_relink(struct mf_memory *memory, uint32_t stripe) {
    mf_slot *slots = group_at(memory, 0);
    for (uint64_t i = 0; i < memory->at.groups * MF_GROUP; i++) {
        uint64_t offset = mf_slot_offset(atomic_load_explicit(&slots[i], memory_order_acquire));
        const struct mf_block *block = offset ? block_at(memory, offset) : NULL;
        if (block && stripe_of(block->hash) == stripe && block->linked != block->version) {
            set_linked(block, block->version);
            mf_note_written(memory, offset, sizeof *block);
        }
    }
}

bool mf_is_linked(struct mf_memory *memory, uint64_t offset) {
    const struct mf_block *block = block_at(memory, offset);
    if (!block)
        return true;
    uint64_t hash = block->hash;
    mf_slot *group = group_at(memory, mf_home_group(&memory->at, hash));
    for (int turn = 0; turn < 2; turn++, group = group_at(memory, mf_other_group(&memory->at, hash)))
        for (unsigned i = 0; i < MF_GROUP; i++) {
            uint64_t value = atomic_load(&group[i]);
            if (value && mf_slot_offset(value) == offset)
                return true;
        }
    return false;
}

void mf_retire_block(struct mf_memory *memory, uint64_t offset) {
    struct mf_op op = {.memory = memory};
    const struct mf_block *block = block_at(memory, offset);
    if (block)
        retire_block(&op, block, NULL);
}

static void mark(struct mf_memory *memory, const uint32_t *spans, uint32_t count, uint64_t *linked, uint64_t offset) {
    uint32_t span, low = 0, high = count;
    unsigned block = mf_span_block(memory, offset, &span);
    if (block == ~0u || block >= MF_SPAN_WORDS * 64)
        return;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (spans[middle] < span)
            low = middle + 1;
        else
            high = middle;
    }
    if (low < count && spans[low] == span)
        linked[(size_t)low * MF_SPAN_WORDS + block / 64] |= 1ull << block % 64;
}

int mf_mark_linked(struct mf_memory *memory, const uint32_t *spans, uint32_t count, uint64_t *linked,
                   int64_t deadline) {
    struct mf_op op;
    mf_op_begin(&op, memory, deadline - mf_now());
    int status = mf_pin(&op);
    if (status != MF_OK)
        return status;
    MF_GUARDED(
        memory->data, memory->at.data_bytes,
        {
            mf_slot *slots = group_at(memory, 0);
            for (uint64_t i = 0; i < memory->at.groups * MF_GROUP; i++) {
                uint64_t offset = mf_slot_offset(atomic_load_explicit(&slots[i], memory_order_acquire));
                const struct mf_block *block = offset ? block_at(memory, offset) : NULL;
                if (!block)
                    continue;
                mark(memory, spans, count, linked, offset);
                if (open_block(&op, block))
                    for (uint32_t c = 0; op.chunks && c < op.pieces; c++)
                        mark(memory, spans, count, linked, (uint64_t)((uint8_t *)op.piece[c].iov_base - memory->data));
            }
        },
        status = MF_REVOKED);
    mf_op_end(&op);
    return status;
}
