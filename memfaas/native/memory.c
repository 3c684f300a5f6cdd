/* Mapping, formatting and populating a lease's two memfds; clock, futex, fork generation. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "memfaas.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

static uint64_t hint_words(uint64_t spans) { return (spans + 63) / 64; }

/* One index slot for every 160 bytes of heap: small values (100 B and a key) fill heap and index
 * together, at 5 % of the heap. */
#define BYTES_PER_GROUP (160u * MF_GROUP)

void mf_geometry(enum mf_kind kind, uint64_t size, struct mf_header *out) {
    memset(out, 0, sizeof *out);
    out->magic = MF_MAGIC;
    out->format = MF_FORMAT;
    out->kind = kind;
    uint64_t control = sizeof(struct mf_control);
    if (kind == MF_SHARD) {
        out->spans = size / MF_SPAN + (size % MF_SPAN != 0);
        if (out->spans < MF_MIN_SHARD / MF_SPAN)
            out->spans = MF_MIN_SHARD / MF_SPAN;
        out->size = out->spans * MF_SPAN;
        out->groups = out->size / BYTES_PER_GROUP + 2;
        out->heap = round_up(MF_PAGE + out->groups * MF_GROUP * sizeof(mf_slot), MF_SPAN);
        uint64_t part = out->size / 8 / MF_SPAN * MF_SPAN;
        out->part_size = part > MF_MAX_PART ? MF_MAX_PART : part;
        control += out->spans * sizeof(struct mf_span) + MF_CLASSES * hint_words(out->spans) * 8;
    } else {
        out->size = size;
        out->heap = MF_PAGE;
    }
    out->data_bytes = round_up(out->heap + out->size, MF_HUGE_PAGE);
    control += out->data_bytes / MF_SPAN;
    out->control_bytes = round_up(control, MF_PAGE);
}

static bool same_geometry(const struct mf_header *a, const struct mf_header *b) {
    return a->magic == b->magic && a->format == b->format && a->kind == b->kind && a->size == b->size &&
           a->data_bytes == b->data_bytes && a->control_bytes == b->control_bytes && a->groups == b->groups &&
           a->heap == b->heap && a->spans == b->spans && a->part_size == b->part_size;
}

int mf_format(int data_fd, int control_fd, const struct mf_header *header, enum mf_state state) {
    struct stat data_stat, control_stat;
    if (fstat(data_fd, &data_stat) || fstat(control_fd, &control_stat))
        return errno;
    if ((uint64_t)data_stat.st_size != header->data_bytes || (uint64_t)control_stat.st_size != header->control_bytes)
        return EINVAL;
    struct mf_control *control =
        mmap(NULL, header->control_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, control_fd, 0);
    if (control == MAP_FAILED)
        return errno;
    control->head = (struct mf_control_head){MF_MAGIC, MF_FORMAT};
    atomic_store(&control->epoch, 2);
    if (header->kind == MF_SHARD) {
        _Atomic uint64_t *unassigned = (_Atomic uint64_t *)&control->spans[header->spans];
        for (uint64_t span = 0; span < header->spans; span++)
            atomic_fetch_or_explicit(&unassigned[span / 64], 1ull << span % 64, memory_order_relaxed);
    }
    atomic_store(&control->state, state);
    munmap(control, header->control_bytes);
    struct mf_header own = *header;
    if (getrandom(&own.seed, sizeof own.seed, 0) != sizeof own.seed)
        return errno;
    own.seed |= 1; /* 0: not known */
    return pwrite(data_fd, &own, sizeof own, 0) == sizeof own ? 0 : errno ? errno : EIO;
}

static void *map_aligned(int fd, size_t size) {
    /* At a 2 MiB boundary, or the kernel can't map 2 MiB pages. */
    uint8_t *space = mmap(NULL, size + MF_HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED)
        return MAP_FAILED;
    uint8_t *at = (uint8_t *)round_up((uintptr_t)space, MF_HUGE_PAGE);
    void *mapped = mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (mapped == MAP_FAILED) {
        munmap(space, size + MF_HUGE_PAGE);
        return MAP_FAILED;
    }
    if (at > space)
        munmap(space, (size_t)(at - space));
    munmap(at + size, (size_t)(space + MF_HUGE_PAGE - at));
    madvise(at, size, MADV_HUGEPAGE); /* refused where the kernel has none: then 4 KiB pages */
    return at;
}

int mf_map(struct mf_memory *memory, int data_fd, int control_fd, uint32_t participant) {
    memset(memory, 0, sizeof *memory);
    struct mf_header header, expected;
    struct mf_control_head control;
    struct stat data_stat, control_stat;
    ssize_t got = pread(data_fd, &header, sizeof header, 0);
    if (got < 0)
        return errno;
    if (got != sizeof header || fstat(data_fd, &data_stat) || fstat(control_fd, &control_stat) ||
        pread(control_fd, &control, sizeof control, 0) != sizeof control || control.magic != MF_MAGIC ||
        control.format != MF_FORMAT)
        return EINVAL;
    if (header.magic != MF_MAGIC || (header.kind != MF_SHARD && header.kind != MF_REGION) ||
        header.size > (1ull << 46))
        return EINVAL;
    mf_geometry(header.kind, header.size, &expected);
    if (!same_geometry(&header, &expected) || (uint64_t)data_stat.st_size != expected.data_bytes ||
        (uint64_t)control_stat.st_size != expected.control_bytes || participant >= MF_PARTICIPANTS)
        return EINVAL;
    memory->at = header;
    memory->control_bytes = expected.control_bytes;
    memory->hint_words = hint_words(expected.spans);
    memory->participant = participant;
    memory->generation = mf_fork_generation();
    memory->control = mmap(NULL, expected.control_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, control_fd, 0);
    if (memory->control == MAP_FAILED)
        return errno;
    memory->data = map_aligned(data_fd, expected.data_bytes);
    if (memory->data == MAP_FAILED) {
        int error = errno;
        munmap(memory->control, expected.control_bytes);
        return error;
    }
    memory->hints = (_Atomic uint64_t *)&memory->control->spans[expected.spans];
    memory->written = (_Atomic uint8_t *)(memory->hints + (expected.spans ? MF_CLASSES * memory->hint_words : 0));
    mf_guard_install();
    return 0;
}

void mf_unmap(struct mf_memory *memory) {
    munmap(memory->data, memory->at.data_bytes);
    munmap(memory->control, memory->control_bytes);
}

static int back(struct mf_memory *memory, uint64_t from, uint64_t to) {
    int error = 0;
    if (!memory->unlocked) {
        if (mlock(memory->data + from, to - from) == 0)
            return 0;
        error = EPERM; /* reported once; the pages are still populated below */
        memory->unlocked = true;
    }
    if (madvise(memory->data + from, to - from, MADV_POPULATE_WRITE) != 0 && errno != EINVAL)
        return errno == EFAULT || errno == EHWPOISON ? ENOMEM : errno;
    return error;
}

/* What is punched is somebody else's now, also when it was punched before this process began to serve. */
static bool is_punched(struct mf_memory *memory, uint64_t at) {
    return memory->at.kind == MF_SHARD && at >= memory->at.heap && at - memory->at.heap < memory->at.size &&
           atomic_load(&memory->control->spans[(at - memory->at.heap) / MF_SPAN].holder) == MF_PUNCHED;
}

int mf_populate(struct mf_memory *memory, size_t limit) {
    uint64_t from = memory->populated, left = memory->at.data_bytes - from;
    uint64_t end = from + (limit < left ? limit : left);
    int error = 0;
    if (from == 0 && !memory->unlocked)
        mlock(memory->control, memory->control_bytes);
    while (!error && from < end) {
        bool punched = is_punched(memory, from);
        uint64_t to = from;
        do
            to = to / MF_SPAN * MF_SPAN + MF_SPAN;
        while (to < end && is_punched(memory, to) == punched);
        to = to < end ? to : end;
        error = punched ? 0 : back(memory, from, to);
        if (!error || error == EPERM)
            memory->populated = from = to;
    }
    return error;
}

int mf_attach(struct mf_memory *memory, uint32_t pid, uint64_t start_time, uint32_t *participant) {
    for (uint32_t i = 1; i < MF_PARTICIPANTS; i++) {
        struct mf_participant *place = &memory->control->participants[i];
        uint32_t none = 0;
        if (atomic_compare_exchange_strong(&place->state, &none, 1)) {
            place->pid = pid;
            place->start_time = start_time;
            *participant = i;
            return 0;
        }
    }
    return EMFILE;
}

uint32_t mf_revoke(struct mf_memory *memory) {
    uint32_t before = atomic_exchange(&memory->control->state, MF_STATE_REVOKED);
    mf_futex_wake(&memory->control->state, INT_MAX);
    return before;
}

static bool change_state(struct mf_memory *memory, uint32_t from, uint32_t to) {
    bool was = atomic_compare_exchange_strong(&memory->control->state, &from, to);
    mf_futex_wake(&memory->control->state, INT_MAX);
    return was;
}

bool mf_freeze(struct mf_memory *memory) { return change_state(memory, MF_STATE_SERVING, MF_STATE_FROZEN); }

bool mf_thaw(struct mf_memory *memory) { return change_state(memory, MF_STATE_FROZEN, MF_STATE_SERVING); }

void mf_set_epoch(struct mf_memory *memory, uint64_t epoch) {
    memory->at.epoch = epoch;
    MF_GUARDED(memory->data, MF_PAGE, ((struct mf_header *)memory->data)->epoch = epoch, (void)0);
}

uint64_t mf_operations(struct mf_memory *memory) {
    uint64_t operations = 0;
    uint32_t top = atomic_load(&memory->control->pin_top);
    for (uint32_t i = 0; i < top && i < MF_PINS; i++)
        operations += atomic_load_explicit(&memory->control->pins[i].uses, memory_order_relaxed);
    return operations;
}

int64_t mf_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

void mf_nap(int64_t ns) {
    struct timespec time = {ns / 1000000000, ns % 1000000000};
    nanosleep(&time, NULL);
}

void mf_futex_wait(_Atomic uint32_t *word, uint32_t value, int64_t deadline) {
    struct timespec until = {deadline / 1000000000, deadline % 1000000000};
    /* WAIT_BITSET takes an absolute CLOCK_MONOTONIC time. */
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET, value, &until, NULL, FUTEX_BITSET_MATCH_ANY);
}

void mf_futex_wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

/* A forked child must not use its parent's links: same participant, same sockets. */
static uint32_t generation;
static void forked(void) { generation++; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forked); }
uint32_t mf_fork_generation(void) { return generation; }
