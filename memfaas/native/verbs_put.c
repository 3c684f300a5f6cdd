/* Changes of a shard over verbs: what they need is written into the function's memory, and a message behind it,
 * on the same queue pair, has the function execute them. One round trip; two for a value of many spans. */
#include <string.h>

#include "verbs.h"

#define UNIT (2 * MF_SEGMENT)
_Static_assert(MF_SPAN % UNIT == 0, "no unit lies in two spans");

/* The function's answer, with the manifest that was replaced. */
static int finish(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_replaced *replaced) {
    struct mf_reply reply;
    int status = mf_queue_reply(queue, stream->fd, &reply, replaced->manifest, MF_MAX_MANIFEST, deadline);
    replaced->length = 0;
    if (status == MF_OK)
        replaced->length = (uint32_t)reply.value_len;
    return status;
}

/* Adds the work to a list: all of it in the message, if it fits there, or else in the landing area, staged at the
 * same place of our own buffer. Returns the bytes there. */
static uint64_t add_small(struct mf_list *list, struct mf_queue *queue, struct mf_request *request,
                          const struct iovec *payload, size_t count) {
    uint64_t length = 0, at = request->landing;
    for (size_t i = 0; i < count; i++)
        length += payload[i].iov_len;
    if (length && sizeof *request + length <= MF_SLOT) {
        mf_list_message(list, queue, request, payload, count);
        return 0;
    }
    uint8_t *staged = queue->buffer + MF_BULK_AT;
    for (size_t i = 0; i < count; at += payload[i++].iov_len)
        if (payload[i].iov_len) /* memcpy takes no NULL, even of no bytes */
            memcpy(staged + at, payload[i].iov_base, payload[i].iov_len);
    if (length)
        mf_list_write(list, queue, staged + request->landing, length, queue->landing + request->landing,
                      queue->landing_key);
    mf_list_message(list, queue, request, NULL, 0);
    return length;
}

static int send_small(struct mf_queue *queue, struct mf_request *request, const struct mf_putting *put) {
    struct mf_list list;
    struct iovec payload[3] = {{(void *)put->key, put->key_len}, {(void *)put->meta, put->meta_len},
                               {(void *)put->value, put->value_len}};
    mf_list_begin(&list);
    if (request->verb == MF_PUT)
        request->c = mf_value_sum(put->meta, put->meta_len, put->value, put->value_len);
    add_small(&list, queue, request, payload, request->verb == MF_PUT ? 3 : 1);
    return mf_list_post(&list, queue, false);
}

int mf_verbs_put_next(struct mf_queue *queue, struct mf_request *request, const void *key, const void *value) {
    struct iovec payload[2] = {{(void *)key, request->key_len}, {(void *)value, request->value_len}};
    if (queue->sent == queue->taken)
        queue->batch_bytes = 0;
    if (queue->sent - queue->taken >= MF_REMEMBERED || queue->batch.count + 2 > MF_LIST ||
        queue->batch_bytes + request->key_len + request->value_len > MF_LANDING)
        return MF_WAIT;
    request->landing = (uint32_t)queue->batch_bytes;
    request->c = mf_value_sum(NULL, 0, value, request->value_len);
    queue->batch_bytes += add_small(&queue->batch, queue, request, payload, 2);
    return MF_OK;
}

int mf_verbs_put_reply(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline,
                       struct mf_replaced *replaced) {
    int status = mf_list_post(&queue->batch, queue, false);
    return status == MF_OK ? finish(queue, stream, deadline, replaced) : status;
}

struct writing {
    struct mf_flow flow;
    const uint64_t *offsets; /* of the spans */
    uint64_t *sums;
    bool constant;
};

/* Whole spans go where they will lie. Their sums are taken before the device reads them. */
static int write_unit(struct mf_flow *flow, struct mf_list *list, uint64_t from, uint64_t count, uint8_t *here) {
    struct writing *writing = (struct writing *)flow;
    struct mf_queue *queue = flow->queue;
    uint64_t offset = writing->offsets[from / MF_SPAN] + from % MF_SPAN, *sum = writing->sums + from / MF_SEGMENT;
    const uint8_t *value = flow->data + from;
    uint32_t key;
    int status = mf_queue_key(queue, flow->stream, flow->deadline, offset, &key);
    for (uint64_t at = 0; status == MF_OK && at < count; at += MF_SEGMENT)
        *sum++ = here == value ? mf_hash(value + at, MF_SEGMENT, 0)
                               : mf_hash_copy(here + at, value + at, MF_SEGMENT, false);
    if (status == MF_OK)
        mf_list_write(list, queue, here, count, queue->remote->data + offset, key);
    return status;
}

/* Another thread may have changed the caller's buffer while the device read it. Then nobody knows what was written, and
 * it goes once more, as a copy that nobody changes: it has bytes of both times, as over the other fabrics. */
static bool is_as_before(struct mf_flow *flow, uint64_t from, uint64_t count, const uint8_t *here) {
    const struct writing *writing = (const struct writing *)flow;
    const uint64_t *sum = writing->sums + from / MF_SEGMENT;
    bool same = true;
    if (writing->constant || here != flow->data + from)
        return true;
    for (uint64_t at = 0; same && at < count; at += MF_SEGMENT)
        same = mf_hash(here + at, MF_SEGMENT, 0) == *sum++;
    return same;
}

static int write_spans(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline,
                       const struct mf_putting *put, const uint64_t *offsets, uint64_t *sums) {
    struct writing writing = {.flow = {.queue = queue,
                                       .stream = stream,
                                       .deadline = deadline,
                                       .data = (uint8_t *)put->value,
                                       .length = put->value_len / MF_SPAN * MF_SPAN,
                                       .unit = UNIT,
                                       .begin = write_unit,
                                       .finish = is_as_before},
                              .offsets = offsets,
                              .sums = sums,
                              .constant = put->constant};
    return mf_flow_run(&writing.flow);
}

static int send_large(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_request *request,
                      const struct mf_putting *put) {
    struct mf_list list;
    struct mf_request reserve = *request;
    struct mf_reply reply;
    uint64_t offsets[MF_MAX_PART / MF_SPAN], spans = put->value_len / MF_SPAN, sums[MF_MAX_SEGMENTS];
    reserve.verb = MF_RESERVE;
    mf_list_begin(&list);
    mf_list_message(&list, queue, &reserve, NULL, 0);
    int status = mf_list_post(&list, queue, false);
    if (status == MF_OK)
        status = mf_queue_reply(queue, stream->fd, &reply, offsets, sizeof offsets, deadline);
    if (status != MF_OK)
        return status == MF_FULL ? MF_WAIT : status;
    if (reply.value_len != spans * sizeof *offsets)
        return MF_BROKEN;
    for (uint64_t i = 0; i < spans; i++)
        if (offsets[i] % MF_SPAN || offsets[i] > queue->remote->memory.at.data_bytes - MF_SPAN)
            return MF_BROKEN;
    status = write_spans(queue, stream, deadline, put, offsets, sums);
    if (status != MF_OK)
        return status;
    uint64_t segments = mf_segments_of(put->value_len), tail = put->value_len % MF_SPAN, done = spans * MF_SPAN;
    uint8_t *staged = queue->buffer + MF_BULK_AT, *at = staged + segments * sizeof *sums;
    memcpy(at, put->key, put->key_len);
    at += put->key_len;
    if (put->meta_len) /* memcpy takes no NULL, even of no bytes */
        memcpy(at, put->meta, put->meta_len);
    at += put->meta_len;
    for (uint64_t segment = done / MF_SEGMENT; segment < segments; segment++) {
        const uint8_t *from = (const uint8_t *)put->value + segment * MF_SEGMENT;
        uint64_t left = put->value_len - segment * MF_SEGMENT, count = left < MF_SEGMENT ? left : MF_SEGMENT;
        sums[segment] = mf_hash_copy(at + (segment * MF_SEGMENT - done), from, count, false);
    }
    memcpy(staged, sums, segments * sizeof *sums);
    request->verb = MF_COMMIT;
    mf_list_write(&list, queue, staged, (size_t)(at - staged) + tail, queue->landing, queue->landing_key);
    mf_list_message(&list, queue, request, NULL, 0);
    return mf_list_post(&list, queue, false);
}

/* MF_WAIT: a large value for which there are no whole spans; it can go over the stream. */
int mf_verbs_change(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_request *request,
                    struct mf_putting *put) {
    if (request->key_len > MF_MAX_KEY || request->meta_len > MF_MAX_META)
        return MF_BAD;
    if (request->verb == MF_PUT && request->value_len > MF_MAX_PART)
        return MF_TOO_LARGE;
    bool small = request->verb != MF_PUT ||
                 (uint64_t)request->key_len + request->meta_len + request->value_len <= MF_LANDING;
    struct mf_request ours = *request; /* the caller's may still have to go over the stream */
    int status = small ? send_small(queue, &ours, put) : send_large(queue, stream, deadline, &ours, put);
    return status == MF_OK ? finish(queue, stream, deadline, &put->replaced) : status;
}
