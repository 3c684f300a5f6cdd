/* Exactly once over tcp: what a connection's operations did, remembered beside the data.
 *
 * A client whose connection breaks between request and reply cannot know whether a put took effect,
 * and doing it again could undo somebody else's later put. So each connection has an id and numbers
 * its changes, the shard remembers the newest 32 of each, and the client asks (MF_RESUME) before it
 * repeats one. That an id has been asked about also fences it: a request with it that is still under way
 * somewhere finds a record that is not its connection's, and ends there. The record is written under the lock of the key's stripe; when the function is killed
 * between the slot's store and the record's, the next function finds `pending` and decides by the
 * block: linked or in limbo means that it took effect. (The dead one's pin still keeps the block.) */
#include "memfaas.h"

static struct mf_writer *find(struct mf_memory *memory, uint64_t id) {
    for (uint32_t i = 0; i < MF_WRITERS; i++)
        if (atomic_load(&memory->control->writers[i].id) == id)
            return &memory->control->writers[i];
    return NULL;
}

static void touch(struct mf_writer *writer) { atomic_store(&writer->used, mf_now()); }

/* A record for a new connection: of those whose connections are gone, the one that was used least recently.
 * NULL when the id has one already: then it was asked about (a fence), or it is another connection's. The
 * caller sees to it that nobody else is in here. */
struct mf_writer *mf_writer_open(struct mf_memory *memory, uint64_t id, const bool *in_use) {
    struct mf_writer *writers = memory->control->writers;
    if (find(memory, id))
        return NULL;
    struct mf_writer *oldest = NULL;
    for (uint32_t i = 0; i < MF_WRITERS; i++)
        if (!in_use[i] && (!oldest || atomic_load(&writers[i].used) < atomic_load(&oldest->used)))
            oldest = &writers[i];
    if (!oldest)
        return NULL;
    atomic_store(&oldest->pending, 0);
    atomic_store(&oldest->done, 0);
    atomic_store(&oldest->id, id);
    touch(oldest);
    return oldest;
}

void mf_writer_intend(struct mf_op *op, uint64_t block, bool unlinks) {
    if (!op->writer)
        return;
    touch(op->writer);
    atomic_store(&op->writer->block, block);
    atomic_store(&op->writer->unlinks, unlinks);
    atomic_store(&op->writer->pending, op->number);
}

static void done(struct mf_writer *writer, uint32_t number) {
    uint64_t before = atomic_load(&writer->done);
    uint32_t behind = number - (uint32_t)(before >> 32);
    uint32_t bits = behind < MF_REMEMBERED ? (uint32_t)before << behind : 0;
    atomic_store(&writer->done, (uint64_t)number << 32 | bits | 1);
    atomic_store(&writer->pending, 0);
}

void mf_writer_done(struct mf_op *op, bool happened) {
    if (!op->writer)
        return;
    if (happened)
        done(op->writer, op->number);
    else
        atomic_store(&op->writer->pending, 0);
}

bool mf_writer_asked(struct mf_memory *memory, uint64_t id, uint32_t number) {
    struct mf_writer *writer = find(memory, id);
    if (!writer)
        return false;
    touch(writer);
    uint64_t done_ = atomic_load(&writer->done);
    uint32_t behind = (uint32_t)(done_ >> 32) - number;
    return behind < MF_REMEMBERED && done_ >> behind & 1;
}

void mf_writers_recover(struct mf_memory *memory) {
    for (uint32_t i = 0; i < MF_WRITERS; i++) {
        struct mf_writer *writer = &memory->control->writers[i];
        uint32_t pending = atomic_load(&writer->pending);
        if (!pending)
            continue;
        uint64_t block = atomic_load(&writer->block);
        bool linked = mf_is_linked(memory, block);
        if (atomic_load(&writer->unlinks) ? !linked : linked || mf_in_limbo(memory, block))
            done(writer, pending);
        else
            atomic_store(&writer->pending, 0);
    }
}
