/* A region over verbs: all four operations are the device's, and the function has no part in them. */
#include <string.h>

#include "verbs.h"

#define HALF (MF_BULK / 2)

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* A READ or WRITE for each chunk that the bytes lie in. */
static int transfer(struct mf_queue *queue, struct mf_stream *stream, uint8_t verb, uint64_t offset, uint8_t *here,
                    uint64_t length) {
    struct mf_list list = {.count = 0};
    while (length) {
        uint64_t some = least(length, MF_CHUNK - offset % MF_CHUNK), there = queue->remote->data + offset;
        uint32_t key;
        int status = mf_queue_key(queue, stream, offset, &key);
        if (status != MF_OK)
            return status;
        if (verb == MF_READ)
            mf_list_read(&list, queue, here, some, there, key);
        else
            mf_list_write(&list, queue, here, some, there, key);
        offset += some;
        here += some;
        length -= some;
    }
    return mf_list_post(&list, queue, true);
}

/* One half of the buffer is under way while the other one is copied. */
static int move(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint8_t verb, uint64_t offset,
                uint8_t *data, uint64_t length) {
    uint8_t *halves = queue->buffer + MF_BULK_AT;
    uint64_t ready[2] = {queue->done, queue->done};
    int status = MF_OK;
    for (uint64_t from = 0; status == MF_OK && from < length + HALF; from += HALF) {
        unsigned half = from / HALF % 2;
        if (from < length) {
            uint64_t count = least(HALF, length - from);
            status = mf_queue_wait(queue, stream->fd, ready[half], 0, deadline);
            if (status == MF_OK && verb == MF_WRITE)
                memcpy(halves + half * HALF, data + from, count);
            if (status == MF_OK)
                status = transfer(queue, stream, verb, offset + from, halves + half * HALF, count);
            ready[half] = queue->posted;
        }
        if (status != MF_OK || from == 0 || verb == MF_WRITE)
            continue;
        status = mf_queue_wait(queue, stream->fd, ready[half ^ 1], 0, deadline);
        if (status == MF_OK)
            memcpy(data + (from - HALF), halves + (half ^ 1) * HALF, least(HALF, length - (from - HALF)));
    }
    return status == MF_OK ? mf_queue_wait(queue, stream->fd, queue->posted, 0, deadline) : status;
}

/* MF_NOT_HERE: they are the CPUs', so the function has to do it. */
static int claim(struct mf_queue *queue, struct mf_stream *stream) {
    _Atomic uint32_t *atomics = &queue->remote->atomics;
    uint32_t known = atomic_load(atomics);
    if (known == MF_ATOMICS_NOBODY) {
        struct mf_request request = {.verb = MF_CLAIM};
        struct mf_pull pull;
        int status = mf_ask(stream, &request, NULL, NULL, NULL);
        if (status == MF_OK)
            status = mf_pull_reply(stream, &pull);
        if (status != MF_OK && status != MF_ABSENT && status != MF_NOT_HERE)
            return status == MF_BROKEN ? MF_NEED_CONNECTION : status; /* nothing was changed */
        known = status == MF_OK ? MF_ATOMICS_DEVICE : MF_ATOMICS_CPU;
        atomic_store(atomics, known);
    }
    return known == MF_ATOMICS_DEVICE ? MF_OK : MF_NOT_HERE;
}

static int change_word(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint8_t verb,
                       uint64_t offset, uint64_t b, uint64_t c, uint64_t *before) {
    struct mf_list list = {.count = 0};
    uint8_t *into = queue->buffer + MF_GROUPS_AT;
    uint32_t key;
    int status = claim(queue, stream);
    if (status == MF_OK && (status = mf_queue_key(queue, stream, offset, &key)) == MF_BROKEN)
        status = MF_NEED_CONNECTION;
    if (status != MF_OK)
        return status;
    mf_list_read(&list, queue, into, 8, 0, 0);
    struct ibv_send_wr *work = &list.work[0];
    work->opcode = verb == MF_SWAP ? IBV_WR_ATOMIC_CMP_AND_SWP : IBV_WR_ATOMIC_FETCH_AND_ADD;
    work->wr.atomic.remote_addr = queue->remote->data + offset;
    work->wr.atomic.rkey = key;
    work->wr.atomic.compare_add = verb == MF_SWAP ? b : c;
    work->wr.atomic.swap = verb == MF_SWAP ? c : 0;
    status = mf_list_post(&list, queue, true);
    if (status == MF_OK)
        status = mf_queue_wait(queue, stream->fd, queue->posted, 0, deadline);
    if (status == MF_OK)
        memcpy(before, into, 8);
    return status;
}

int mf_verbs_region(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint8_t verb, uint64_t offset,
                    uint8_t *data, uint64_t length, uint64_t b, uint64_t c, uint64_t *before) {
    const struct mf_header *at = &queue->remote->memory.at;
    bool word = verb == MF_SWAP || verb == MF_ADD;
    uint64_t bytes = word ? 8 : length;
    if (at->kind != MF_REGION || bytes > at->size || offset > at->size - bytes || (word && offset % 8))
        return MF_BAD;
    if (word)
        return change_word(queue, stream, deadline, verb, at->heap + offset, b, c, before);
    return move(queue, stream, deadline, verb, at->heap + offset, data, length);
}
