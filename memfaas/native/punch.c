/* Free spans go back to the kernel, and the shard keeps serving.
 *
 * A punched span has a holder that nobody is, so nobody takes blocks from it, and nothing reads it: a late read
 * would bring its pages back. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/statvfs.h>

#include "memfaas.h"

#define GROUP (MF_HUGE_PAGE / MF_SPAN) /* spans in a 2 MiB page, which comes back only as a whole */

static void let_go(struct mf_memory *memory, uint32_t from, uint32_t to) {
    for (uint32_t i = from; i < to; i++)
        mf_span_settle(memory, i);
}

/* Takes spans [from, to), all or none. */
static bool take(struct mf_memory *memory, uint32_t from, uint32_t to) {
    for (uint32_t i = from; i < to; i++)
        if (!mf_take_unassigned(memory, i, MF_PUNCHED)) {
            let_go(memory, from, i);
            return false;
        }
    return true;
}

static uint64_t cut(struct mf_memory *memory, int data_fd, uint32_t from, uint32_t to) {
    uint64_t length = (uint64_t)(to - from) * MF_SPAN;
    off_t offset = (off_t)(memory->at.heap + (uint64_t)from * MF_SPAN);
    if (fallocate(data_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, (off_t)length) == 0)
        return length;
    let_go(memory, from, to);
    return 0;
}

/* Runs of free spans, from the end of the heap, where there are most; those that are whole 2 MiB pages first. */
static uint64_t punch(struct mf_memory *memory, int data_fd, uint64_t limit, uint32_t unit) {
    uint32_t shift = unit > 1 ? (uint32_t)(memory->at.heap / MF_SPAN % unit) : 0; /* of span 0 in its page */
    uint64_t freed = 0;
    uint32_t to = (uint32_t)memory->at.spans;
    to -= (to + shift) % unit;
    while (freed < limit && to >= unit) {
        uint32_t from = to;
        while (from >= unit && (uint64_t)(to - from) * MF_SPAN < limit - freed && take(memory, from - unit, from))
            from -= unit;
        if (from < to)
            freed += cut(memory, data_fd, from, to);
        to = from < to ? from : to - unit;
    }
    return freed;
}

bool mf_may_punch(struct mf_memory *memory, int64_t deadline) {
    uint64_t used, free_spans = 0;
    if (memory->at.kind == MF_SHARD) {
        mf_sweep(memory, deadline);
        mf_heap_stats(memory, &used, &free_spans);
    }
    return free_spans > 0;
}

uint64_t mf_punch(struct mf_memory *memory, int data_fd, uint64_t limit, int64_t deadline) {
    if (memory->at.kind != MF_SHARD)
        return 0;
    mf_sweep(memory, deadline);
    uint64_t freed = punch(memory, data_fd, limit, GROUP);
    return freed < limit ? freed + punch(memory, data_fd, limit - freed, 1) : freed;
}

static bool is_punched(struct mf_memory *memory, uint32_t span) {
    return atomic_load(&memory->control->spans[span].holder) == MF_PUNCHED;
}

#define SPARE (8u << 20) /* A file system needs blocks of its own, also to write where it has allocated some before. */

/* Nobody may write to a file where it has no blocks: on a full disk that would be a SIGBUS, as if it were revoked. */
static int fill(struct mf_memory *memory, int data_fd, uint32_t span) {
    off_t offset = (off_t)(memory->at.heap + (uint64_t)span * MF_SPAN);
    struct statvfs disk;
    if (fstatvfs(data_fd, &disk))
        return errno;
    if (disk.f_bavail * disk.f_frsize < SPARE + MF_SPAN)
        return ENOSPC;
    int error;
    do
        error = fallocate(data_fd, FALLOC_FL_KEEP_SIZE, offset, MF_SPAN) ? errno : 0;
    while (error == EINTR);
    return error;
}

int mf_unpunch(struct mf_memory *memory, int data_fd) {
    int error = 0;
    for (uint32_t i = 0; !error && i < memory->at.spans; i++)
        if (is_punched(memory, i) && (data_fd < 0 || !(error = fill(memory, data_fd, i))))
            mf_span_settle(memory, i);
    return error;
}

uint64_t mf_punched(struct mf_memory *memory) {
    uint64_t spans = 0;
    for (uint32_t i = 0; i < memory->at.spans; i++)
        spans += is_punched(memory, i);
    return spans * MF_SPAN;
}
