/* A lease moves: its bytes are copied to another donor while it is in use.
 *
 * `written` has a byte for each MF_SPAN of DATA. Who writes DATA notes the chunk after the bytes and before
 * it unpins; the copier clears the mark first and reads the bytes then. So a chunk whose mark is clear once the
 * memory is frozen and drained has been copied as it is. (A block is written while its span is held, and noted
 * when the span is let go, which is also before the pin that linked it clears.)
 *
 * What control memory knows goes along as far as it matters there: which blocks are taken, the versions of
 * the stripes, and what connections have done (writers.c). Nothing is pinned then, so what is in limbo is free.
 * Blocks in spans that somebody still holds may never be linked; there they are the reaper's to put right.
 *
 * Frames: struct piece, then its bytes. The receiver checks all that it is told, for clients can write all
 * that the sender reads. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "memfaas.h"

enum kind { DATA = 1, SPANS, STRIPES, WRITERS, END };

struct piece {
    uint32_t kind;
    uint32_t pad;
    uint64_t offset; /* DATA: there; SPANS: the first one; END: hash of the index */
    uint64_t length;
};

struct span_copy {
    uint32_t class_;
    uint32_t held;
    uint64_t alloc[MF_SPAN_WORDS];
};

struct writer_copy {
    uint64_t id, done;
};

#define RUN (4u << 20) /* bytes of one DATA piece, at most */
#define AT_ONCE 64u    /* spans in one SPANS piece */
#define TO_DISK (SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER)

/* --- a socket with a deadline ------------------------------------------------------------------------ */

static int set_timeout(struct mf_copy *copy) {
    int64_t left = copy->deadline - mf_now();
    if (left <= 0)
        return ETIMEDOUT;
    left = left / 1000 + 1;
    struct timeval time = {left / 1000000, left % 1000000};
    return setsockopt(copy->fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time) ? errno : 0;
}

/* Until the peer takes some more. */
static int wait_for_room(struct mf_copy *copy) {
    struct pollfd room = {.fd = copy->fd, .events = POLLOUT};
    int64_t until = copy->deadline;
    if (copy->patience && copy->patience < until - mf_now())
        until = mf_now() + copy->patience;
    for (int64_t left; (left = until - mf_now()) > 0;) {
        struct timespec time = {left / 1000000000, left % 1000000000};
        int ready = ppoll(&room, 1, &time, NULL);
        if (ready > 0)
            return 0;
        if (ready < 0 && errno != EINTR)
            return errno;
    }
    return ETIMEDOUT;
}

static int send_all(struct mf_copy *copy, struct iovec *pieces, size_t count) {
    int error = 0;
    while (count && !(error = wait_for_room(copy))) { /* again: a slow peer takes some each time */
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
        ssize_t sent = sendmsg(copy->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno != EINTR && errno != EAGAIN)
                return errno;
            continue;
        }
        for (; count && (size_t)sent >= pieces->iov_len; count--, pieces++)
            sent -= (ssize_t)pieces->iov_len;
        if (count) {
            pieces->iov_base = (uint8_t *)pieces->iov_base + sent;
            pieces->iov_len -= (size_t)sent;
        }
    }
    return error;
}

static int send_piece(struct mf_copy *copy, enum kind kind, uint64_t offset, const void *bytes, uint64_t length) {
    struct piece piece = {kind, 0, offset, length};
    struct iovec pieces[2] = {{&piece, sizeof piece}, {(void *)bytes, length}};
    return send_all(copy, pieces, length ? 2 : 1);
}

static int receive_all(struct mf_copy *copy, void *into, uint64_t length) {
    int error = 0;
    for (uint8_t *at = into; length && !(error = set_timeout(copy));) {
        ssize_t got = recv(copy->fd, at, length, MSG_WAITALL);
        if (got == 0)
            return ECONNRESET;
        if (got > 0) {
            at += got;
            length -= (uint64_t)got;
        } else if (errno != EINTR)
            return errno == EAGAIN ? ETIMEDOUT : errno;
    }
    return error;
}

/* --- sending -------------------------------------------------------------------------------------------- */

static uint64_t data_end(struct mf_memory *memory) { return memory->at.heap + memory->at.size; }

static uint64_t chunks_of(struct mf_memory *memory) { return (data_end(memory) + MF_SPAN - 1) / MF_SPAN; }

void mf_copy_all(struct mf_memory *memory) {
    for (uint64_t i = 0; i < chunks_of(memory); i++)
        if (atomic_load(&memory->written[i]))
            atomic_store(&memory->written[i], MF_EVER | MF_DIRTY);
}

/* Whether the chunk has to be copied; then its mark is clear. A span that is unassigned holds nothing, and is
 * not to be read: it may be punched. Who takes it gives it a class before it looks at the mark. */
static bool claim(struct mf_memory *memory, uint64_t chunk) {
    if (!(atomic_load_explicit(&memory->written[chunk], memory_order_relaxed) & MF_DIRTY))
        return false;
    atomic_store(&memory->written[chunk], MF_EVER); /* seq_cst: see mf_note_chunk */
    if (memory->at.kind == MF_REGION || chunk < memory->at.heap / MF_SPAN)
        return true;
    return atomic_load(&memory->control->spans[chunk - memory->at.heap / MF_SPAN].class_) != 0;
}

/* One round over all that was written since the last one. */
int mf_copy_written(struct mf_memory *memory, struct mf_copy *copy) {
    uint64_t chunks = chunks_of(memory), chunk = 0;
    int error = 0;
    while (!error && chunk < chunks) {
        if (!claim(memory, chunk)) {
            chunk++;
            continue;
        }
        uint64_t first = chunk++;
        while (chunk < chunks && (chunk - first) * MF_SPAN < RUN && claim(memory, chunk))
            chunk++;
        atomic_thread_fence(memory_order_seq_cst); /* see mf_note_chunk */
        uint64_t from = first ? first * MF_SPAN : MF_PAGE;
        uint64_t to = chunk * MF_SPAN < data_end(memory) ? chunk * MF_SPAN : data_end(memory);
        error = send_piece(copy, DATA, from, memory->data + from, to - from);
        copy->bytes += to - from;
    }
    return error;
}

bool mf_drain(struct mf_memory *memory, int64_t deadline) {
    struct mf_control *control = memory->control;
    for (int64_t nap = 20000;; nap = nap < 1000000 ? 2 * nap : nap) {
        uint32_t top = atomic_load(&control->pin_top), i = 0;
        while (i < top && i < MF_PINS && atomic_load(&control->pins[i].word) == 0)
            i++;
        if (i >= top || i >= MF_PINS)
            return true;
        if (mf_now() >= deadline)
            return false;
        mf_nap(nap);
    }
}

static int send_spans(struct mf_memory *memory, struct mf_copy *copy) {
    struct span_copy *copies = calloc(AT_ONCE, sizeof *copies);
    int error = copies ? 0 : ENOMEM;
    for (uint64_t first = 0; !error && first < memory->at.spans; first += AT_ONCE) {
        uint64_t count = memory->at.spans - first < AT_ONCE ? memory->at.spans - first : AT_ONCE;
        bool any = false;
        for (uint64_t i = 0; i < count; i++) {
            struct mf_span *span = &memory->control->spans[first + i];
            /* The holder first: once it is gone, the rest is final. */
            uint32_t holder = atomic_load(&span->holder);
            copies[i].held = holder != 0 && holder != MF_PUNCHED;
            copies[i].class_ = atomic_load(&span->class_);
            any = any || copies[i].class_;
            for (uint32_t w = 0; w < MF_SPAN_WORDS; w++)
                copies[i].alloc[w] = atomic_load(&span->alloc[w]) & ~atomic_load(&span->limbo[w]);
        }
        if (any)
            error = send_piece(copy, SPANS, first, copies, count * sizeof *copies);
    }
    free(copies);
    return error;
}

/* And, in the place of an offset, the seed of the blocks' sums. */
static int send_stripes(struct mf_memory *memory, struct mf_copy *copy) {
    volatile uint64_t seed = 0; /* the agent may cut the memory at any moment */
    uint64_t versions[MF_STRIPES];
    MF_GUARDED(memory->data, MF_PAGE, seed = ((const struct mf_header *)memory->data)->seed, return EFAULT);
    for (uint32_t i = 0; i < MF_STRIPES; i++)
        versions[i] = atomic_load(&memory->control->stripes[i].version);
    return send_piece(copy, STRIPES, seed, versions, sizeof versions);
}

struct known_writer {
    struct writer_copy copy;
    int64_t used;
};

static int by_use(const void *a, const void *b) {
    const struct known_writer *one = a, *other = b;
    return (one->used > other->used) - (one->used < other->used);
}

static int send_writers(struct mf_memory *memory, struct mf_copy *copy) {
    struct known_writer *known = calloc(MF_WRITERS, sizeof *known);
    struct writer_copy *copies = calloc(MF_WRITERS, sizeof *copies);
    uint64_t count = 0;
    int error = known && copies ? 0 : ENOMEM;
    for (uint32_t i = 0; !error && i < MF_WRITERS; i++) {
        struct mf_writer *writer = &memory->control->writers[i];
        if (atomic_load(&writer->id))
            known[count++] = (struct known_writer){
                {atomic_load(&writer->id), atomic_load(&writer->done)}, atomic_load(&writer->used)};
    }
    if (!error) {
        qsort(known, count, sizeof *known, by_use); /* in order, for there the clock is another one */
        for (uint64_t i = 0; i < count; i++)
            copies[i] = known[i].copy;
        error = send_piece(copy, WRITERS, 0, copies, count * sizeof *copies);
    }
    free(known);
    free(copies);
    return error;
}

static uint64_t index_sum(struct mf_memory *memory) {
    return memory->at.kind == MF_SHARD ? mf_hash(memory->data + MF_PAGE, memory->at.heap - MF_PAGE, 0) : 0;
}

/* Frozen and drained: after this, all of it is there. */
int mf_copy_rest(struct mf_memory *memory, struct mf_copy *copy) {
    int error = mf_copy_written(memory, copy);
    if (!error && memory->at.kind == MF_SHARD)
        error = send_spans(memory, copy);
    if (!error)
        error = send_stripes(memory, copy);
    if (!error)
        error = send_writers(memory, copy);
    volatile uint64_t sum = 0;
    if (!error)
        MF_GUARDED(memory->data, memory->at.data_bytes, sum = index_sum(memory), return EFAULT);
    return error ? error : send_piece(copy, END, sum, NULL, 0);
}

/* --- receiving ------------------------------------------------------------------------------------------- */

/* Through a buffer that stays in the cache: a page that is written as a whole need not be cleared first, nor
 * mapped. */
static int receive_data(struct mf_memory *memory, struct mf_copy *copy, int data_fd, const struct piece *piece,
                        uint8_t *buffer) {
    if (piece->offset < MF_PAGE || piece->offset > data_end(memory) || piece->length > RUN ||
        piece->length > data_end(memory) - piece->offset)
        return EPROTO;
    int error = 0;
    for (uint64_t done = 0; !error && done < piece->length;) {
        uint64_t count = piece->length - done < MF_SPAN ? piece->length - done : MF_SPAN;
        if ((error = receive_all(copy, buffer, count)))
            break;
        for (uint64_t at = 0; at < count;) {
            ssize_t put = pwrite(data_fd, buffer + at, count - at, (off_t)(piece->offset + done + at));
            if (put < 0)
                return errno;
            at += (uint64_t)put;
        }
        done += count;
    }
    mf_note_written(memory, piece->offset, piece->length);
    copy->bytes += piece->length;
    if (copy->spill && !error && sync_file_range(data_fd, (off_t)piece->offset, (off_t)piece->length, TO_DISK))
        return errno;
    if (copy->spill)
        posix_fadvise(data_fd, (off_t)piece->offset, (off_t)piece->length, POSIX_FADV_DONTNEED);
    return error;
}

static int receive_spans(struct mf_memory *memory, struct mf_copy *copy, const struct piece *piece, uint8_t *buffer) {
    const struct span_copy *copies = (const struct span_copy *)buffer;
    uint64_t count = piece->length / sizeof *copies;
    if (piece->length % sizeof *copies || count > AT_ONCE || piece->offset > memory->at.spans ||
        count > memory->at.spans - piece->offset)
        return EPROTO;
    int error = receive_all(copy, buffer, piece->length);
    for (uint64_t i = 0; !error && i < count; i++)
        mf_span_adopt(memory, (uint32_t)(piece->offset + i), copies[i].class_, copies[i].alloc, copies[i].held);
    return error;
}

static int receive_stripes(struct mf_memory *memory, struct mf_copy *copy, const struct piece *piece) {
    uint64_t versions[MF_STRIPES];
    if (piece->length != sizeof versions)
        return EPROTO;
    int error = receive_all(copy, versions, sizeof versions);
    for (uint32_t i = 0; !error && i < MF_STRIPES; i++)
        atomic_store(&memory->control->stripes[i].version, versions[i]);
    MF_GUARDED(memory->data, MF_PAGE, ((struct mf_header *)memory->data)->seed = piece->offset, return EFAULT);
    return error;
}

static int receive_writers(struct mf_memory *memory, struct mf_copy *copy, const struct piece *piece, uint8_t *buffer) {
    const struct writer_copy *copies = (const struct writer_copy *)buffer;
    uint64_t count = piece->length / sizeof *copies;
    if (piece->length % sizeof *copies || count > MF_WRITERS)
        return EPROTO;
    int error = receive_all(copy, buffer, piece->length);
    for (uint64_t i = 0; !error && i < count; i++) {
        atomic_store(&memory->control->writers[i].id, copies[i].id);
        atomic_store(&memory->control->writers[i].done, copies[i].done);
        atomic_store(&memory->control->writers[i].used, i + 1); /* before all that is used here */
    }
    return error;
}

static int check_index(struct mf_memory *memory, uint64_t sum) {
    volatile uint64_t here = 0; /* the agent may cut the memory at any moment */
    MF_GUARDED(memory->data, memory->at.data_bytes, here = index_sum(memory), return EFAULT);
    return here == sum ? 0 : EPROTO;
}

_Static_assert(MF_WRITERS * sizeof(struct writer_copy) <= MF_SPAN, "the buffer holds every piece");
_Static_assert(AT_ONCE * sizeof(struct span_copy) <= MF_SPAN, "the buffer holds every piece");

/* Into memory that was just formatted, and that nobody else has mapped. EPROTO: nonsense came. */
int mf_receive(struct mf_memory *memory, struct mf_copy *copy, int data_fd) {
    uint8_t *buffer = aligned_alloc(MF_PAGE, MF_SPAN);
    struct piece piece = {0};
    int error = buffer ? 0 : ENOMEM;
    while (!error && piece.kind != END) {
        if ((error = receive_all(copy, &piece, sizeof piece)))
            break;
        switch (piece.kind) {
        case DATA:
            error = receive_data(memory, copy, data_fd, &piece, buffer);
            break;
        case SPANS:
            error = receive_spans(memory, copy, &piece, buffer);
            break;
        case STRIPES:
            error = receive_stripes(memory, copy, &piece);
            break;
        case WRITERS:
            error = receive_writers(memory, copy, &piece, buffer);
            break;
        case END:
            error = check_index(memory, piece.offset);
            break;
        default:
            error = EPROTO;
        }
    }
    free(buffer);
    return error;
}
