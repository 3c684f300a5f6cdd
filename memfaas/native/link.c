/* One operation on one link: on mapped memory by ourselves, over tcp by the function, over verbs by the device. */
#include <string.h>

#include "index.h"
#include "verbs.h"

static int usable(struct mf_link *link) {
    if (link->closed)
        return MF_NEED_CONNECTION;
    uint32_t generation = link->fabric == MF_SHM ? link->memory.generation : mf_pool_generation(link->pool);
    return generation == mf_fork_generation() ? MF_OK : MF_STALE;
}

static int take_stream(struct mf_link *link, struct mf_stream **stream) {
    *stream = mf_pool_take(link->pool);
    return *stream ? MF_OK : MF_NEED_CONNECTION;
}

struct mf_stream *mf_link_stream(struct mf_link *link) {
    return usable(link) == MF_OK && link->fabric != MF_SHM ? mf_pool_take(link->pool) : NULL;
}

/* A request without a value, and the head of its reply; the stream is the caller's then, in any case. `deadline`: of
 * an operation that has begun already, or 0. */
static int ask_until(struct mf_link *link, int64_t deadline, struct mf_request request, const void *key,
                     const void *data, struct mf_stream **stream, struct mf_pull *pull) {
    int status = take_stream(link, stream);
    if (status == MF_OK && deadline)
        mf_pool_hurry(*stream, deadline);
    if (status == MF_OK)
        status = mf_ask(*stream, &request, key, NULL, data);
    return status == MF_OK ? mf_pull_reply(*stream, pull) : status;
}

static int ask(struct mf_link *link, struct mf_request request, const void *key, const void *data,
               struct mf_stream **stream, struct mf_pull *pull) {
    return ask_until(link, 0, request, key, data, stream, pull);
}

static void give(struct mf_link *link, struct mf_stream *stream) {
    if (stream)
        mf_pool_give(link->pool, stream);
}

/* What to do about a verbs stream on which something failed: it is not used again. */
static int mind(struct mf_stream *stream, int status) {
    if (status == MF_BROKEN || status == MF_TIMEOUT || status == MF_NEED_CONNECTION || mf_queue_of(stream)->broken)
        stream->error = -1;
    return status;
}

static int get_one_sided(struct mf_link *link, uint8_t space, const void *key, uint32_t key_len, struct mf_got *got) {
    int status = take_stream(link, &got->stream);
    if (status != MF_OK)
        return status;
    got->one_sided = true;
    got->deadline = mf_now() + link->timeout;
    status = mf_verbs_get(mf_queue_of(got->stream), got->stream, got->deadline, space, key, key_len, &got->op);
    return mind(got->stream, status);
}

static void describe(struct mf_got *got, bool found_here) {
    got->value_len = found_here ? got->op.value_len : got->pull.reply.value_len;
    got->meta_len = found_here ? got->op.meta_len : got->pull.reply.meta_len;
    got->flags = found_here ? got->op.flags : got->pull.reply.flags;
}

int mf_link_get(struct mf_link *link, int patience, uint8_t space, const void *key, uint32_t key_len,
                struct mf_got *got) {
    got->taken = got->one_sided = false;
    got->stream = NULL;
    got->pull.reply = (struct mf_reply){0};
    mf_op_begin(&got->op, &link->memory, patience ? link->timeout : 0);
    int status = usable(link);
    if (status != MF_OK)
        return status;
    if (link->fabric == MF_SHM) {
        got->op.space = space;
        status = mf_get(&got->op, key, key_len);
    } else if (patience == MF_IMPATIENT)
        return MF_WAIT;
    else if (link->fabric == MF_VERBS && patience == MF_PATIENT)
        status = get_one_sided(link, space, key, key_len, got);
    else
        status = ask(link, (struct mf_request){.verb = MF_GET, .space = space, .key_len = key_len}, key, NULL,
                     &got->stream, &got->pull);
    if (status == MF_OK)
        describe(got, link->fabric == MF_SHM || got->one_sided);
    return status;
}

int mf_link_take(struct mf_link *link, struct mf_got *got, void *into, void *meta) {
    got->taken = true;
    if (link->fabric == MF_SHM)
        return mf_get_copy(&got->op, into, meta);
    if (got->one_sided) {
        int status = mf_verbs_take(mf_queue_of(got->stream), got->stream, got->deadline, &got->op, into, meta);
        return mind(got->stream, status);
    }
    memcpy(meta, got->pull.meta, got->meta_len);
    return mf_pull_value(got->stream, &got->pull, into);
}

void mf_link_leave(struct mf_link *link, struct mf_got *got) {
    if (link->fabric == MF_SHM) {
        mf_op_end(&got->op);
        return;
    }
    if (got->stream && !got->one_sided && !got->taken && got->pull.reply.value_len && got->pull.reply.status == MF_OK)
        got->stream->error = -1; /* the value is still in it */
    give(link, got->stream);
}

int mf_link_has(struct mf_link *link, bool patient, const void *key, uint32_t key_len) {
    int status = usable(link);
    if (status != MF_OK)
        return status;
    if (link->fabric == MF_SHM) {
        struct mf_op op;
        mf_op_begin(&op, &link->memory, patient ? link->timeout : 0);
        status = mf_get(&op, key, key_len);
        mf_op_end(&op);
        return status;
    }
    if (!patient)
        return MF_WAIT;
    struct mf_got got;
    int64_t deadline = 0;
    if (link->fabric == MF_VERBS) {
        status = mf_link_get(link, MF_PATIENT, 0, key, key_len, &got);
        mf_link_leave(link, &got);
        if (status != MF_CHANGED)
            return status;
        deadline = got.deadline;
    }
    struct mf_request request = {.verb = MF_GET, .flags = MF_HEAD_ONLY, .key_len = key_len};
    struct mf_stream *stream;
    struct mf_pull pull;
    status = ask_until(link, deadline, request, key, NULL, &stream, &pull);
    give(link, stream);
    return status;
}

static int change_with(struct mf_stream *stream, struct mf_request *request, struct mf_putting *put) {
    struct mf_pull pull;
    int status = mf_ask(stream, request, put->key, put->meta, put->value);
    if (status == MF_OK)
        status = mf_pull_reply(stream, &pull);
    if (status == MF_OK)
        status = mf_pull_replaced(stream, &pull, &put->replaced);
    return status;
}

/* A change by the function. Whether an earlier attempt took effect is asked first, on the new connection. */
static int change(struct mf_link *link, struct mf_request request, struct mf_putting *put) {
    struct mf_stream *stream;
    struct mf_pull pull;
    int status = MF_OK;
    if (put->change.id) {
        struct mf_request resume = {.verb = MF_RESUME, .a = put->change.id, .b = put->change.number};
        status = ask(link, resume, NULL, NULL, &stream, &pull);
        give(link, stream);
        if (status != MF_OK || pull.reply.a)
            return status;
        put->change.id = 0;
    }
    if ((status = take_stream(link, &stream)) != MF_OK)
        return status;
    mf_number(stream, &request, &put->change);
    bool by_device = link->fabric == MF_VERBS && !put->conditional;
    if (by_device) {
        int64_t deadline = mf_now() + link->timeout;
        status = mind(stream, mf_verbs_change(mf_queue_of(stream), stream, deadline, &request, put));
        if (status == MF_WAIT)
            mf_pool_hurry(stream, deadline);
    }
    if (!by_device || status == MF_WAIT) /* what finds no whole spans goes with the stream */
        status = change_with(stream, &request, put);
    if (status != MF_BROKEN)
        put->change.id = 0;
    give(link, stream);
    return status;
}

int mf_link_put(struct mf_link *link, bool patient, struct mf_putting *put) {
    int status = usable(link);
    put->replaced.length = 0;
    if (status != MF_OK)
        return status;
    if (link->fabric == MF_SHM) {
        struct mf_op op;
        mf_op_begin(&op, &link->memory, patient ? link->timeout : 0);
        op.space = put->space;
        op.conditional = put->conditional;
        op.expected = put->expected;
        status = mf_put(&op, put->key, put->key_len, put->meta, put->meta_len, put->value, put->value_len, put->flags,
                        &put->replaced);
        mf_op_end(&op);
        return status;
    }
    if (!patient)
        return MF_WAIT;
    struct mf_request request = {.verb = MF_PUT,
                                 .flags = put->flags,
                                 .space = put->space,
                                 .key_len = put->key_len,
                                 .meta_len = put->meta_len,
                                 .value_len = put->value_len};
    if (!put->conditional)
        return change(link, request, put);
    uint8_t tags[2 * MF_TAG];
    if (put->meta_len != MF_TAG)
        return MF_BAD;
    memcpy(tags, put->meta, MF_TAG);
    memcpy(tags + MF_TAG, &put->expected, MF_TAG);
    struct mf_putting both = *put;
    both.meta = tags;
    both.meta_len = request.meta_len = sizeof tags;
    request.conditional = 1;
    status = change(link, request, &both);
    put->change = both.change;
    put->replaced = both.replaced;
    return status;
}

int mf_link_delete(struct mf_link *link, bool patient, struct mf_putting *put) {
    int status = usable(link);
    put->replaced.length = 0;
    if (status != MF_OK)
        return status;
    if (link->fabric == MF_SHM) {
        struct mf_op op;
        mf_op_begin(&op, &link->memory, patient ? link->timeout : 0);
        op.space = put->space;
        op.conditional = put->conditional;
        op.expected = put->expected;
        status = mf_delete(&op, put->key, put->key_len, &put->replaced);
        mf_op_end(&op);
        return status;
    }
    if (!patient)
        return MF_WAIT;
    struct mf_request request = {.verb = MF_DELETE,
                                 .space = put->space,
                                 .conditional = put->conditional,
                                 .key_len = put->key_len,
                                 .c = put->expected};
    return change(link, request, put);
}

int mf_link_scan(struct mf_link *link, uint8_t space, uint64_t *cursor, uint8_t *out, size_t room, size_t *length) {
    int status = usable(link);
    if (status != MF_OK)
        return status;
    if (link->fabric == MF_SHM) {
        struct mf_op op;
        mf_op_begin(&op, &link->memory, link->timeout);
        op.space = space;
        status = mf_scan(&op, cursor, out, room, length);
        mf_op_end(&op);
        return status;
    }
    struct mf_stream *stream;
    struct mf_pull pull;
    status = ask(link, (struct mf_request){.verb = MF_SCAN, .space = space, .a = *cursor}, NULL, NULL, &stream, &pull);
    if (status == MF_OK && pull.reply.value_len > room) {
        stream->error = -1;
        status = MF_BAD;
    }
    if (status == MF_OK) {
        *length = pull.reply.value_len;
        *cursor = pull.reply.a;
        status = mf_pull_bytes(stream, out, *length);
    }
    give(link, stream);
    return status;
}

int mf_link_stats(struct mf_link *link, struct mf_stats *out) {
    int status = usable(link);
    if (status != MF_OK)
        return status;
    if (link->fabric == MF_SHM)
        return mf_stats(&link->memory, out);
    struct mf_stream *stream;
    struct mf_pull pull;
    status = ask(link, (struct mf_request){.verb = MF_STATS}, NULL, NULL, &stream, &pull);
    if (status == MF_OK)
        status = mf_pull_bytes(stream, out, sizeof *out);
    give(link, stream);
    return status;
}

static int region_here(struct mf_link *link, uint8_t verb, uint64_t offset, void *data, uint64_t length, uint64_t b,
                       uint64_t c, uint64_t *before) {
    struct mf_op op;
    int status;
    mf_op_begin(&op, &link->memory, link->timeout);
    switch (verb) {
    case MF_READ:
        status = mf_region_read(&op, offset, data, length);
        break;
    case MF_WRITE:
        status = mf_region_write(&op, offset, data, length);
        break;
    case MF_SWAP:
        status = mf_region_swap(&op, offset, b, c, before);
        break;
    default:
        status = mf_region_add(&op, offset, c, before);
    }
    mf_op_end(&op);
    return status;
}

int mf_link_region(struct mf_link *link, uint8_t verb, uint64_t offset, void *data, uint64_t length, uint64_t b,
                   uint64_t c, uint64_t *before) {
    int status = usable(link);
    if (status != MF_OK)
        return status;
    if (link->fabric == MF_SHM)
        return region_here(link, verb, offset, data, length, b, c, before);
    struct mf_request request = {.verb = verb, .value_len = length, .a = offset, .b = b, .c = c};
    struct mf_stream *stream;
    struct mf_pull pull = {.reply = {0}};
    int64_t deadline = 0;
    if (link->fabric == MF_VERBS) {
        if ((status = take_stream(link, &stream)) != MF_OK)
            return status;
        deadline = mf_now() + link->timeout;
        status = mind(stream, mf_verbs_region(mf_queue_of(stream), stream, deadline, verb, offset, data, length, b, c,
                                              before));
        give(link, stream);
        if (status != MF_NOT_HERE)
            return status;
    }
    status = ask_until(link, deadline, request, NULL, data, &stream, &pull);
    if (status == MF_OK && verb == MF_READ)
        status = mf_pull_bytes(stream, data, length);
    *before = pull.reply.a;
    give(link, stream);
    return status;
}

/* --- batches ------------------------------------------------------------------------------------------------ */

int mf_batch_put(struct mf_stream *stream, struct mf_request *request, const void *key, const void *value) {
    struct mf_queue *queue = mf_queue_of(stream);
    return queue ? mf_verbs_put_next(queue, request, key, value) : mf_ask(stream, request, key, NULL, value);
}

int mf_batch_reply(struct mf_link *link, struct mf_stream *stream, struct mf_replaced *replaced) {
    struct mf_pull pull;
    if (link->fabric == MF_VERBS)
        return mind(stream, mf_verbs_put_reply(mf_queue_of(stream), stream, mf_now() + link->timeout, replaced));
    int status = mf_pull_reply(stream, &pull);
    return status == MF_OK ? mf_pull_replaced(stream, &pull, replaced) : status;
}

int mf_batch_get(struct mf_link *link, struct mf_stream *stream, struct mf_wanted *wanted, unsigned count) {
    int64_t deadline = mf_now() + link->timeout;
    return mind(stream, mf_verbs_get_many(mf_queue_of(stream), stream, deadline, wanted, count));
}

int mf_batch_open(struct mf_link *link, struct mf_stream *stream, const struct mf_wanted *one, struct mf_op *found) {
    mf_op_begin(found, &link->remote->memory, 0);
    found->hash = one->hash;
    return mf_verbs_open(mf_queue_of(stream), one->at, mf_class_size(mf_slot_class(one->slot)), one->key, one->key_len,
                         found);
}
