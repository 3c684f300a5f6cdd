/* The chunks of a lease's memory that a network device can reach, each registered with a key of its own.
 *
 * To register pins the pages, which takes as long as to fetch them if they are not there yet: 100 ms and more for each
 * GiB. So no client waits for all of it: it asks for the chunk that it needs, and meanwhile the rest is registered
 * ahead, in the background. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "serve.h"
#include "verbs.h"

void mf_chunks_make(struct mf_chunks *chunks, struct mf_memory *memory) {
    mf_turns_make(&chunks->turns);
    chunks->memory = memory;
    chunks->count = (memory->at.data_bytes + MF_CHUNK - 1) / MF_CHUNK;
}

static uint64_t bytes_of(const struct mf_chunks *chunks, uint64_t chunk) {
    uint64_t left = chunks->memory->at.data_bytes - chunk * MF_CHUNK;
    return left < MF_CHUNK ? left : MF_CHUNK;
}

static int registered(struct mf_chunks *chunks, uint64_t chunk) {
    struct mf_memory *memory = chunks->memory;
    int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
    if (memory->at.kind == MF_REGION)
        access |= IBV_ACCESS_REMOTE_ATOMIC;
    if (chunks->registered[chunk])
        return 0;
    /* From here on the pages are pinned: who cuts the memory off must end us, or they are not free. */
    atomic_store(&memory->control->registered, 1);
    if (atomic_load(&memory->control->state) == MF_STATE_REVOKED)
        return EIDRM;
    uint8_t *from = memory->data + chunk * MF_CHUNK;
    chunks->registered[chunk] = mf_verbs.reg_mr(chunks->pd, from, bytes_of(chunks, chunk), access);
    return chunks->registered[chunk] ? 0 : mf_errno();
}

int mf_chunks_key(struct mf_chunks *chunks, uint64_t chunk, uint64_t *key) {
    int error = chunk < chunks->count ? registered(chunks, chunk) : EINVAL;
    if (error)
        return error;
    /* What is written one-sided into a region, nobody notes. (Into a shard's spans: who commits it.) */
    if (chunks->memory->at.kind == MF_REGION)
        mf_note_written(chunks->memory, chunk * MF_CHUNK, bytes_of(chunks, chunk));
    *key = chunks->registered[chunk]->rkey;
    return 0;
}

int mf_chunks_ahead(struct mf_chunks *chunks) {
    while (chunks->ahead < chunks->count && chunks->registered[chunks->ahead])
        chunks->ahead++;
    if (chunks->failure || chunks->ahead == chunks->count)
        return ENOENT;
    return chunks->failure = registered(chunks, chunks->ahead);
}

void mf_chunks_drop(struct mf_chunks *chunks) {
    for (uint64_t i = 0; chunks->registered && i < chunks->count; i++)
        if (chunks->registered[i]) {
            mf_verbs.dereg_mr(chunks->registered[i]);
            chunks->registered[i] = NULL;
        }
    chunks->ahead = 0;
    chunks->failure = 0;
    atomic_store(&chunks->memory->control->registered, 0);
}

void mf_chunks_explain(struct mf_chunks *chunks, int error, char *why) {
    struct ibv_device_attr about;
    struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
    unsigned long long count = 0, bytes = 0, whole = chunks->memory->at.data_bytes;
    for (uint64_t i = 0; i < chunks->count; i++)
        if (chunks->registered[i]) {
            count++;
            bytes += bytes_of(chunks, i);
        }
    getrlimit(RLIMIT_MEMLOCK, &limit);
    if (error == EIDRM)
        snprintf(why, MF_WHY, "the lease is over");
    else if (error == ENOMEM && limit.rlim_cur != RLIM_INFINITY && bytes + 2 * MF_CHUNK > limit.rlim_cur) /* others pin memory, too */
        snprintf(why, MF_WHY, "%llu of %llu MiB are registered, more the limit of locked memory (%llu KiB) does not let "
                 "us; raise it: ulimit -l, LimitMEMLOCK of systemd", bytes >> 20, whole >> 20,
                 (unsigned long long)limit.rlim_cur >> 10);
    else if (mf_verbs.query_device(chunks->device->context, &about) == 0)
        snprintf(why, MF_WHY, "%llu of %llu MiB are registered, in %llu pieces, more device %.40s does not let us: %s (it "
                 "has room for %d, of all programs)", bytes >> 20, whole >> 20, count, chunks->device->name,
                 strerror(error), about.max_mr);
    else
        snprintf(why, MF_WHY, "%llu of %llu MiB are registered: %s", bytes >> 20, whole >> 20, strerror(error));
}
