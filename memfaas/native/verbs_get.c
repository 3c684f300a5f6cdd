/* Reads of a shard, one-sided: the function has no part in them.
 *
 * One READ gives a group of the index, one more a block, which is believed only if it is the key's, if its
 * checksums fit, and if it says that its slot led to it when it was read (`linked`, see shard.c). That is the moment at
 * which the get takes effect. A place that was good before is tried first, by the same rules, without the index.
 *
 * That a key is not there is believed only if none of its slots could be its own. What stays doubtful is
 * MF_CHANGED; whoever asked then asks the function. */
#include <string.h>

#include "index.h"
#include "verbs.h"

#define TRIES 4
#define UNIT (2 * MF_SEGMENT)

static _Atomic uint64_t *place_of(struct mf_remote *remote, uint64_t hash) {
    return &remote->places[(hash >> 16) % MF_PLACES];
}

/* One READ, and the wait for it. */
static int fetch(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint64_t offset, size_t length,
                 uint8_t *into) {
    struct mf_list list;
    uint32_t key;
    int status = mf_queue_key(queue, stream, deadline, offset, &key);
    if (status != MF_OK)
        return status;
    mf_list_begin(&list);
    mf_list_read(&list, queue, into, length, queue->remote->data + offset, key);
    status = mf_list_post(&list, queue, true);
    return status == MF_OK ? mf_queue_wait(queue, stream->fd, queue->posted, 0, deadline) : status;
}

/* Whether a slot makes sense: clients can write it. */
static bool is_block(const struct mf_header *at, uint64_t slot) {
    uint64_t offset = mf_slot_offset(slot), size = mf_class_size(mf_slot_class(slot));
    return size >= sizeof(struct mf_block) && size <= MF_INLINE && mf_in_heap(at, offset, size) &&
           offset / MF_CHUNK == (offset + size - 1) / MF_CHUNK;
}

/* Fills `found` from a block that was read to here. MF_CHANGED: it was not the key's when it was read. */
int mf_verbs_open(struct mf_queue *queue, uint64_t at, uint64_t size, const void *key, uint32_t key_len,
                  struct mf_op *found) {
    const struct mf_block *block = (const struct mf_block *)(queue->buffer + at);
    bool good = mf_open_block(found, block, size) && block->linked == block->version && block->version != 0 &&
                block->hash == found->hash && block->space == found->space && block->key_len == key_len &&
                memcmp(block + 1, key, key_len) == 0;
    return good ? MF_OK : MF_CHANGED;
}

static int try_slot(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint64_t slot, const void *key,
                    uint32_t key_len, struct mf_op *found) {
    if (!is_block(&queue->remote->memory.at, slot))
        return MF_CHANGED;
    uint64_t size = mf_class_size(mf_slot_class(slot));
    int status = fetch(queue, stream, deadline, mf_slot_offset(slot), size, queue->buffer + MF_BULK_AT);
    return status == MF_OK ? mf_verbs_open(queue, MF_BULK_AT, size, key, key_len, found) : status;
}

static int try_groups(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, const void *key,
                      uint32_t key_len, struct mf_op *found) {
    struct mf_remote *remote = queue->remote;
    const struct mf_header *at = &remote->memory.at;
    uint64_t group = mf_home_group(at, found->hash);
    int result = MF_ABSENT;
    for (int turn = 0; turn < 2; turn++, group = mf_other_group(at, found->hash)) {
        uint64_t slots[MF_GROUP];
        uint8_t *into = queue->buffer + MF_GROUPS_AT;
        int status = fetch(queue, stream, deadline, mf_group_offset(group), sizeof slots, into);
        if (status != MF_OK)
            return status;
        memcpy(slots, into, sizeof slots);
        for (unsigned i = 0; i < MF_GROUP; i++) {
            if (!mf_slot_fits(slots[i], found->hash, found->space))
                continue;
            status = try_slot(queue, stream, deadline, slots[i], key, key_len, found);
            if (status == MF_OK)
                atomic_store_explicit(place_of(remote, found->hash), slots[i], memory_order_relaxed);
            if (status != MF_CHANGED)
                return status;
            result = MF_CHANGED;
        }
    }
    return result;
}

/* Finds the key's block and reads it; `found` is then as after mf_get, but its pieces, if there are chunks, are
 * offsets. */
int mf_verbs_get(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint8_t space, const void *key,
                 uint32_t key_len, struct mf_op *found) {
    struct mf_remote *remote = queue->remote;
    found->memory = &remote->memory;
    if (remote->memory.at.kind != MF_SHARD)
        return MF_BAD;
    found->space = space;
    found->hash = mf_hash_key(key, key_len, space);
    uint64_t place = atomic_load_explicit(place_of(remote, found->hash), memory_order_relaxed);
    int status = MF_CHANGED;
    if (mf_slot_fits(place, found->hash, space))
        status = try_slot(queue, stream, deadline, place, key, key_len, found);
    for (int tries = 0; status == MF_CHANGED && tries < TRIES; tries++)
        status = try_groups(queue, stream, deadline, key, key_len, found);
    return status;
}

struct taking {
    struct mf_flow flow;
    const struct mf_op *found;
    bool good;
};

/* READs for some bytes of a value that lies in pieces. */
static int ask_for(struct mf_flow *flow, struct mf_list *list, uint64_t from, uint64_t count, uint8_t *here) {
    const struct mf_op *found = ((struct taking *)flow)->found;
    struct mf_queue *queue = flow->queue;
    uint64_t start = 0, to = from + count;
    for (uint32_t i = 0; i < found->pieces && start < to; start += found->piece[i++].iov_len) {
        uint64_t end = start + found->piece[i].iov_len, low = from > start ? from : start, high = to < end ? to : end;
        if (low >= high)
            continue;
        uint64_t offset = (uintptr_t)found->piece[i].iov_base + (low - start);
        uint32_t key;
        int status = mf_queue_key(queue, flow->stream, flow->deadline, offset, &key);
        if (status != MF_OK)
            return status;
        if (offset / MF_CHUNK != (offset + (high - low) - 1) / MF_CHUNK)
            return MF_CHANGED;
        mf_list_read(list, queue, here + (low - from), high - low, queue->remote->data + offset, key);
    }
    return MF_OK;
}

static bool check(struct mf_flow *flow, uint64_t from, uint64_t count, const uint8_t *here) {
    struct taking *taking = (struct taking *)flow;
    const uint64_t *sum = taking->found->sums + from / MF_SEGMENT;
    uint8_t *into = flow->data + from;
    for (uint64_t at = 0; at < count; at += MF_SEGMENT) {
        size_t some = count - at < MF_SEGMENT ? count - at : MF_SEGMENT;
        uint64_t is = here == into ? mf_hash(into + at, some, 0) : mf_hash_copy(into + at, here + at, some, false);
        taking->good = is == *sum++ && taking->good;
    }
    return true;
}

static int take_pieces(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, const struct mf_op *found,
                       uint8_t *into) {
    struct taking taking = {.flow = {.queue = queue,
                                     .stream = stream,
                                     .deadline = deadline,
                                     .data = into,
                                     .length = found->value_len,
                                     .unit = UNIT,
                                     .reads = true,
                                     .begin = ask_for,
                                     .finish = check},
                            .found = found,
                            .good = true};
    int status = mf_flow_run(&taking.flow);
    return status == MF_OK && !taking.good ? MF_CHANGED : status;
}

int mf_verbs_take(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_op *found, void *into,
                  void *meta) {
    if (found->chunks == 0)
        return mf_get_copy(found, into, meta) == MF_OK ? MF_OK : MF_CHANGED;
    memcpy(meta, found->meta, found->meta_len); /* before the buffer is used again */
    return take_pieces(queue, stream, deadline, found, into);
}

/* --- many ---------------------------------------------------------------------------------------------------- */

static void choose_slot(struct mf_queue *queue, struct mf_wanted *one) {
    uint64_t slots[MF_GROUP];
    memcpy(slots, queue->buffer + one->at, sizeof slots);
    for (unsigned i = 0; i < MF_GROUP && !one->slot; i++)
        if (mf_slot_fits(slots[i], one->hash, 0))
            one->slot = slots[i];
    if (one->slot)
        atomic_store_explicit(place_of(queue->remote, one->hash), one->slot, memory_order_relaxed);
}

/* All groups with one doorbell, then all blocks with another one. */
int mf_verbs_get_many(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_wanted *wanted,
                      unsigned count) {
    struct mf_remote *remote = queue->remote;
    const struct mf_header *at = &remote->memory.at;
    struct mf_list list;
    uint64_t room = MF_BULK_AT;
    uint32_t key;
    int status = at->kind == MF_SHARD && count <= MF_WANTED_MOST ? MF_OK : MF_BAD;
    mf_list_begin(&list);
    for (unsigned i = 0; i < count && status == MF_OK; i++) {
        struct mf_wanted *one = &wanted[i];
        one->status = MF_CHANGED;
        one->hash = mf_hash_key(one->key, one->key_len, 0);
        one->slot = atomic_load_explicit(place_of(remote, one->hash), memory_order_relaxed);
        one->at = MF_GROUPS_AT + i * MF_GROUP * sizeof(mf_slot);
        if (mf_slot_fits(one->slot, one->hash, 0))
            continue;
        one->slot = 0;
        uint64_t group = mf_group_offset(mf_home_group(at, one->hash));
        if ((status = mf_queue_key(queue, stream, deadline, group, &key)) == MF_OK)
            mf_list_read(&list, queue, queue->buffer + one->at, MF_GROUP * sizeof(mf_slot), remote->data + group, key);
    }
    if (status == MF_OK && list.count && (status = mf_list_post(&list, queue, true)) == MF_OK)
        status = mf_queue_wait(queue, stream->fd, queue->posted, 0, deadline);
    for (unsigned i = 0; i < count && status == MF_OK; i++) {
        struct mf_wanted *one = &wanted[i];
        if (!one->slot)
            choose_slot(queue, one);
        uint64_t offset = mf_slot_offset(one->slot), size = mf_class_size(mf_slot_class(one->slot));
        if (!one->slot || !is_block(at, one->slot) || size > MF_QUEUE_BYTES - room)
            continue;
        one->at = room;
        one->status = MF_OK;
        room += size;
        if ((status = mf_queue_key(queue, stream, deadline, offset, &key)) == MF_OK)
            mf_list_read(&list, queue, queue->buffer + one->at, size, remote->data + offset, key);
    }
    if (status == MF_OK && list.count && (status = mf_list_post(&list, queue, true)) == MF_OK)
        status = mf_queue_wait(queue, stream->fd, queue->posted, 0, deadline);
    return status;
}
