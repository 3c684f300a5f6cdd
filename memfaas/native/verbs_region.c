/* A region over verbs: all four operations are the device's, and the function has no part in them. */
#include <string.h>

#include "verbs.h"

#define UNIT (64u << 10)        /* of what is copied while the next one is under way */
#define LARGE_UNIT (256u << 10) /* of what is not */

struct moving {
    struct mf_flow flow;
    uint64_t offset;
};

/* A READ or WRITE for each chunk that the bytes lie in. */
static int begin(struct mf_flow *flow, struct mf_list *list, uint64_t from, uint64_t count, uint8_t *here) {
    struct mf_queue *queue = flow->queue;
    uint64_t offset = ((struct moving *)flow)->offset + from;
    if (!flow->reads && here != flow->data + from)
        memcpy(here, flow->data + from, count);
    while (count) {
        uint64_t left = MF_CHUNK - offset % MF_CHUNK, some = count < left ? count : left;
        uint32_t key;
        int status = mf_queue_key(queue, flow->stream, flow->deadline, offset, &key);
        if (status != MF_OK)
            return status;
        if (flow->reads)
            mf_list_read(list, queue, here, some, queue->remote->data + offset, key);
        else
            mf_list_write(list, queue, here, some, queue->remote->data + offset, key);
        offset += some;
        here += some;
        count -= some;
    }
    return MF_OK;
}

static bool finish(struct mf_flow *flow, uint64_t from, uint64_t count, const uint8_t *here) {
    if (flow->reads && here != flow->data + from)
        memcpy(flow->data + from, here, count);
    return true;
}

static int move(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint8_t verb, uint64_t offset,
                uint8_t *data, uint64_t length) {
    struct moving moving = {.flow = {.queue = queue,
                                     .stream = stream,
                                     .deadline = deadline,
                                     .data = data,
                                     .length = length,
                                     .unit = length < MF_LEND ? UNIT : LARGE_UNIT,
                                     .reads = verb == MF_READ,
                                     .begin = begin,
                                     .finish = finish},
                            .offset = offset};
    return mf_flow_run(&moving.flow);
}

/* MF_NOT_HERE: they are the CPUs', so the function has to do it. */
static int claim(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline) {
    _Atomic uint32_t *atomics = &queue->remote->atomics;
    uint32_t known = atomic_load(atomics);
    if (known == MF_ATOMICS_NOBODY) {
        struct mf_request request = {.verb = MF_CLAIM};
        struct mf_pull pull;
        mf_pool_hurry(stream, deadline);
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
    struct mf_list list;
    uint8_t *into = queue->buffer + MF_GROUPS_AT;
    uint32_t key;
    int status = claim(queue, stream, deadline);
    if (status == MF_OK && (status = mf_queue_key(queue, stream, deadline, offset, &key)) == MF_BROKEN)
        status = MF_NEED_CONNECTION;
    if (status != MF_OK)
        return status;
    mf_list_begin(&list);
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
