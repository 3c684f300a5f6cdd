/* The client's side of the tcp fabric: a link's connections, and one request on one of them.
 * Those of a verbs link have a queue pair beside them. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "verbs.h"

#define LEAST_NS 1000000 /* a timeout of 0 would be none */

struct pooled {
    struct mf_stream stream; /* first: a stream is its pooled */
    struct mf_queue *queue; /* or NULL */
    struct pooled *next;
};

struct mf_pool {
    pthread_mutex_t mutex;
    struct pooled *idle;
    int64_t timeout;
    uint32_t generation;
    bool closed;
};

struct mf_pool *mf_pool_new(int64_t timeout_ns) {
    struct mf_pool *pool = calloc(1, sizeof *pool);
    if (pool) {
        pthread_mutex_init(&pool->mutex, NULL);
        pool->timeout = timeout_ns;
        pool->generation = mf_fork_generation();
    }
    return pool;
}

int mf_pool_add(struct mf_pool *pool, int fd, struct mf_queue *queue) {
    struct pooled *one = aligned_alloc(64, sizeof *one);
    if (!one)
        return ENOMEM;
    mf_stream_open(&one->stream, fd, pool->timeout);
    one->queue = queue;
    mf_pool_give(pool, &one->stream);
    return 0;
}

struct mf_stream *mf_pool_take(struct mf_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    struct pooled *one = pool->idle;
    if (one)
        pool->idle = one->next;
    pthread_mutex_unlock(&pool->mutex);
    return one ? &one->stream : NULL;
}

struct mf_queue *mf_queue_of(struct mf_stream *stream) { return ((struct pooled *)stream)->queue; }

static void end(struct pooled *one) {
    if (one->queue)
        mf_queue_free(one->queue);
    close(one->stream.fd);
    free(one);
}

void mf_pool_hurry(struct mf_stream *stream, int64_t deadline) {
    int64_t left = deadline - mf_now();
    stream->hurried = true;
    mf_stream_patience(stream, left > LEAST_NS ? left : LEAST_NS);
}

void mf_pool_give(struct mf_pool *pool, struct mf_stream *stream) {
    struct pooled *one = (struct pooled *)stream;
    if (stream->hurried && stream->error >= 0)
        mf_stream_patience(stream, pool->timeout);
    stream->hurried = false;
    pthread_mutex_lock(&pool->mutex);
    bool keep = stream->fd >= 0 && stream->error >= 0 && !pool->closed;
    if (keep) {
        one->next = pool->idle;
        pool->idle = one;
    }
    pthread_mutex_unlock(&pool->mutex);
    if (!keep)
        end(one);
}

void mf_pool_close(struct mf_pool *pool) {
    bool child = pool->generation != mf_fork_generation(); /* a thread of the parent may have the mutex for ever */
    if (!child)
        pthread_mutex_lock(&pool->mutex);
    struct pooled *one = pool->idle;
    pool->idle = NULL;
    pool->closed = true;
    if (!child)
        pthread_mutex_unlock(&pool->mutex);
    while (one) {
        struct pooled *next = one->next;
        end(one);
        one = next;
    }
}

void mf_pool_free(struct mf_pool *pool) {
    mf_pool_close(pool);
    free(pool);
}

uint32_t mf_pool_generation(struct mf_pool *pool) { return pool->generation; }

/* A stream that broke in the middle of a frame can't be used again. */
static int fail(struct mf_stream *stream) {
    int error = stream->error;
    stream->error = -1;
    return error == EAGAIN || error == EWOULDBLOCK ? MF_TIMEOUT : MF_BROKEN;
}

/* Gives the next change on this connection its number; `change` remembers it until the reply comes. */
void mf_number(struct mf_stream *stream, struct mf_request *request, struct mf_change *change) {
    while (stream->id == 0 || stream->number == UINT32_MAX) {
        stream->number = 0;
        if (getrandom(&stream->id, sizeof stream->id, 0) != sizeof stream->id)
            stream->id = 0;
    }
    change->id = request->a = stream->id;
    change->number = ++stream->number;
    request->b = change->number;
}

/* Queues a request; what is large goes out at once. `c` of an inline PUT is filled in. */
int mf_ask(struct mf_stream *stream, const struct mf_request *request, const void *key, const void *meta,
           const void *value) {
    struct mf_request head = *request;
    if (head.key_len > MF_MAX_KEY || head.meta_len > MF_MAX_META)
        return MF_BAD;
    if (head.verb == MF_PUT && head.value_len > MF_MAX_PART)
        return MF_TOO_LARGE;
    bool small = head.verb != MF_PUT || mf_is_inline(head.key_len, head.meta_len, head.value_len);
    if (head.verb == MF_PUT && small)
        head.c = mf_value_sum(meta, head.meta_len, value, head.value_len);
    bool good = mf_stream_queue(stream, &head, sizeof head) && mf_stream_queue(stream, key, head.key_len) &&
                mf_stream_queue(stream, meta, head.meta_len);
    if (good && (head.verb == MF_PUT || head.verb == MF_WRITE))
        good = small ? mf_stream_queue(stream, value, head.value_len)
                     : mf_stream_send(stream, &(struct iovec){(void *)value, head.value_len}, 1);
    return good ? MF_OK : fail(stream);
}

/* The reply's head, meta and checksums. The reply's status is returned, or what broke. */
int mf_pull_reply(struct mf_stream *stream, struct mf_pull *pull) {
    if (!mf_stream_flush(stream) || !mf_stream_fill(stream, sizeof pull->reply))
        return fail(stream);
    memcpy(&pull->reply, stream->in + stream->at, sizeof pull->reply);
    stream->at += sizeof pull->reply;
    struct mf_reply *reply = &pull->reply;
    if (reply->status > MF_STALE || reply->meta_len > MF_MAX_META || reply->segments > MF_MAX_SEGMENTS ||
        reply->value_len > MF_READ_MAX ||
        (reply->segments && reply->segments != mf_segments_of(reply->value_len))) {
        stream->error = EPROTO;
        return fail(stream);
    }
    if (!mf_stream_read(stream, pull->meta, reply->meta_len) ||
        !mf_stream_read(stream, pull->sums, reply->segments * sizeof *pull->sums))
        return fail(stream);
    if (reply->status == MF_BAD) {
        stream->error = -1; /* the function closes it */
    }
    return reply->status;
}

/* The value of a GET, checked while it is in the cache. */
int mf_pull_value(struct mf_stream *stream, struct mf_pull *pull, void *into) {
    uint8_t *value = into;
    uint64_t length = pull->reply.value_len, got = 0, checked = 0;
    bool good = true;
    if (pull->reply.segments == 0) {
        if (!mf_stream_read(stream, into, length))
            return fail(stream);
        return pull->reply.checksum == mf_value_sum(pull->meta, pull->reply.meta_len, into, length) ? MF_OK
                                                                                                     : MF_CORRUPT;
    }
    for (uint32_t segment = 0; got < length;) {
        size_t some = mf_stream_some(stream, value + got, length - got < MF_SPAN ? length - got : MF_SPAN);
        if (!some)
            return fail(stream);
        got += some;
        while (got - checked >= MF_SEGMENT || (got == length && checked < length)) {
            size_t count = length - checked < MF_SEGMENT ? length - checked : MF_SEGMENT;
            good = mf_hash(value + checked, count, 0) == pull->sums[segment++] && good;
            checked += count;
        }
    }
    return good ? MF_OK : MF_CORRUPT;
}

int mf_pull_bytes(struct mf_stream *stream, void *into, size_t length) {
    return mf_stream_read(stream, into, length) ? MF_OK : fail(stream);
}

int mf_pull_replaced(struct mf_stream *stream, struct mf_pull *pull, struct mf_replaced *replaced) {
    replaced->length = 0;
    if (pull->reply.value_len > MF_MAX_MANIFEST) {
        stream->error = EPROTO;
        return fail(stream);
    }
    if (!mf_stream_read(stream, replaced->manifest, pull->reply.value_len))
        return fail(stream);
    replaced->length = (uint32_t)pull->reply.value_len;
    return MF_OK;
}
