/* Kills an operation at every instruction: `crash SCENARIO`.
 *
 * A child does one operation and is traced step by step. Whenever a step has changed what is shared,
 * the memory as it then is, exactly what a SIGKILL at that moment leaves, is copied, and on the copy a
 * survivor goes on, the function reaps, and everything must be right. Only blocks that nothing leads
 * to yet are not compared: their bytes change nothing for anybody. */
#define _GNU_SOURCE
#include "fsck.c"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#define SURVIVOR 1
#define VICTIM 2
#define SECOND_VICTIM 3
#define SMALL 100u
#define LARGE 70000u /* in pieces */
#define OTHERS 12u
#define WRITER_ID 77u
#define NUMBER 5u
#define NOT_TRACED 3 /* exit status */
#define SECOND 1000000000ll

static const char KEY[] = "the key";
static uint8_t pattern[256][LARGE];

struct shared {
    int data, control;
    struct mf_memory function, survivor; /* mappings of it, in this process */
};

struct scenario {
    const char *name;
    uint32_t participant; /* who does it and dies */
    uint32_t before, after; /* lengths of KEY's value, filled with 'b' and 'a'; 0: absent */
    void (*prepare)(struct shared *shared);
    void (*act)(struct mf_memory *memory);
    bool full; /* other puts may find no room */
};

static const struct scenario *scenario;
static const char *at = "the start";
static uint64_t step;

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *what, ...) {
    va_list arguments;
    va_start(arguments, what);
    printf("%s: at step %lu, %s: ", scenario->name, (unsigned long)step, at);
    vprintf(what, arguments);
    printf("\n");
    exit(1);
}

/* --- operations ------------------------------------------------------------------------------------ */

static int put(struct mf_memory *memory, const char *key, uint8_t fill, uint32_t length, int64_t timeout) {
    struct mf_op op;
    struct mf_replaced replaced;
    mf_op_begin(&op, memory, timeout);
    if (memory->participant == 0) {
        op.writer = &memory->control->writers[0];
        op.number = NUMBER;
    }
    int status = mf_put(&op, key, (uint32_t)strlen(key), NULL, 0, pattern[fill], length, 0, &replaced);
    mf_op_end(&op);
    return status;
}

static int delete_(struct mf_memory *memory, const char *key) {
    struct mf_op op;
    struct mf_replaced replaced;
    mf_op_begin(&op, memory, SECOND);
    if (memory->participant == 0) {
        op.writer = &memory->control->writers[0];
        op.number = NUMBER;
    }
    int status = mf_delete(&op, key, (uint32_t)strlen(key), &replaced);
    mf_op_end(&op);
    return status;
}

/* What the key's value is filled with, 0 when it is absent. */
static uint8_t get(struct mf_memory *memory, const char *key, uint32_t *length) {
    static uint8_t value[MF_MAX_PART];
    struct mf_op op;
    mf_op_begin(&op, memory, 0);
    int status = mf_get(&op, key, (uint32_t)strlen(key));
    *length = 0;
    if (status == MF_OK) {
        *length = (uint32_t)op.value_len;
        status = mf_get_copy(&op, value, NULL);
    }
    mf_op_end(&op);
    if (status == MF_ABSENT)
        return 0;
    if (status != MF_OK || memcmp(value, pattern[value[0]], *length))
        fail("a get of '%s' has status %d, first byte %d", key, status, value[0]);
    return value[0];
}

static const char *other(unsigned number) {
    static char key[16];
    snprintf(key, sizeof key, "other %u", number);
    return key;
}

static uint32_t length_of_other(unsigned number) { return number % 3 == 2 ? LARGE : SMALL + number; }

/* --- the memory, and copies of it ------------------------------------------------------------------- */

static struct mf_header geometry;

static void open_shared(struct shared *shared, bool format) {
    shared->data = memfd_create("memfaas-crash-data", MFD_CLOEXEC);
    shared->control = memfd_create("memfaas-crash-control", MFD_CLOEXEC);
    if (ftruncate(shared->data, (off_t)geometry.data_bytes) || ftruncate(shared->control, (off_t)geometry.control_bytes))
        abort();
    if (format && mf_format(shared->data, shared->control, &geometry, MF_STATE_SERVING))
        abort();
}

static void map_shared(struct shared *shared) {
    if (mf_map(&shared->function, shared->data, shared->control, 0) ||
        mf_map(&shared->survivor, shared->data, shared->control, SURVIVOR))
        abort();
}

static size_t index_bytes(void) { return geometry.groups * MF_GROUP * sizeof(mf_slot); }

/* What of the memory decides what others see. */
struct watched {
    size_t offset, length;
    bool in_data;
};
static struct watched watched[4];
static uint8_t *last; /* as it was after the step before */

static void choose_watched(void) {
    size_t writers = offsetof(struct mf_control, writers), spans = offsetof(struct mf_control, spans);
    watched[0] = (struct watched){0, writers + sizeof(struct mf_writer), false};
    watched[1] = (struct watched){spans, geometry.control_bytes - spans, false};
    watched[2] = (struct watched){MF_PAGE, index_bytes(), true};
}

static bool changed(struct mf_memory *memory) {
    bool any = false;
    uint8_t *old = last;
    for (struct watched *w = watched; w->length; old += w->length, w++) {
        uint8_t *now = (w->in_data ? memory->data : (uint8_t *)memory->control) + w->offset;
        if (memcmp(old, now, w->length)) {
            memcpy(old, now, w->length);
            any = true;
        }
    }
    return any;
}

static void copy_memory(struct mf_memory *to, const struct mf_memory *from) {
    memcpy(to->data, from->data, geometry.data_bytes);
    memcpy(to->control, from->control, geometry.control_bytes);
}

static void reap_victim(struct mf_memory *memory) {
    mf_reap(memory, VICTIM);
    mf_put_right(memory, mf_now() + 10 * SECOND);
}

/* --- what must be right ------------------------------------------------------------------------------- */

static void check_whole(struct shared *copy) {
    struct report r;
    if (fsck(copy->data, copy->control, &r))
        abort();
    if (r.locks || r.pins || r.spans || r.broken || r.shared || r.leaked || r.dangling || r.counted_wrong ||
        r.unproved)
        fail("locks %lu pins %lu spans %lu broken %lu shared %lu leaked %lu dangling %lu counted wrong %lu unproved %lu",
             r.locks, r.pins, r.spans, r.broken, r.shared, r.leaked, r.dangling, r.counted_wrong, r.unproved);
}

static void check_others(struct shared *copy) {
    uint32_t length;
    for (unsigned i = 0; i < OTHERS; i++)
        if (get(&copy->survivor, other(i), &length) != i + 1 || length != length_of_other(i))
            fail("'%s' has another value", other(i));
}

static uint8_t check_key(struct shared *copy) {
    uint32_t length;
    uint8_t fill = get(&copy->survivor, KEY, &length);
    bool before = scenario->before ? fill == 'b' && length == scenario->before : fill == 0;
    bool after = scenario->after ? fill == 'a' && length == scenario->after : fill == 0;
    if (!before && !after)
        fail("the key has a value of %u bytes of '%c'", length, fill);
    return fill;
}

/* A key whose lock the dead one cannot hold. */
static const char *bystander(void) {
    static char key[32];
    uint32_t mine = stripe_of(mf_hash_key(KEY, strlen(KEY), 0));
    for (unsigned i = 0;; i++) {
        snprintf(key, sizeof key, "bystander %u", i);
        if (stripe_of(mf_hash_key(key, strlen(key), 0)) != mine)
            return key;
    }
}

static void reap(struct shared *copy) {
    if (scenario->participant == 0)
        mf_reap(&copy->function, 0);
    if (copy->function.control->participants[VICTIM].state)
        mf_reap(&copy->function, VICTIM);
    if (mf_put_right(&copy->function, mf_now() + 10 * SECOND))
        fail("not everything can be put right");
    check_whole(copy);
}

/* The operation stands still, and somebody who holds all the spans is reaped; only then it dies. Whatever
 * it is about to set free must not be free already. */
static void check_second_death(struct shared *copy, const struct mf_memory *from) {
    copy_memory(&copy->survivor, from);
    at = "before a second one is reaped";
    uint8_t fill = check_key(copy);
    for (uint32_t i = 0; i < geometry.spans; i++) {
        struct mf_span *span = &copy->function.control->spans[i];
        if (span->class_ && !span->holder)
            span->holder = SECOND_VICTIM + 1;
    }
    mf_reap(&copy->function, SECOND_VICTIM);
    mf_put_right(&copy->function, mf_now() + SECOND / 500);
    at = "after a second one was reaped";
    reap(copy);
    if (check_key(copy) != fill)
        fail("reaping changed the key's value");
    check_others(copy);
}

static void check_state(struct shared *copy, const struct mf_memory *from) {
    copy_memory(&copy->survivor, from);
    uint8_t fill = check_key(copy);
    check_others(copy);
    at = "before it is reaped";
    int status = put(&copy->survivor, bystander(), 'x', SMALL, scenario->full ? 0 : SECOND);
    if (status != MF_OK && !(scenario->full && status == MF_FULL))
        fail("a put of another key has status %d", status);
    at = "after it is reaped";
    reap(copy);
    if (check_key(copy) != fill)
        fail("reaping changed the key's value");
    check_others(copy);
    if (scenario->participant == 0 && scenario->act != reap_victim &&
        mf_writer_asked(&copy->function, WRITER_ID, NUMBER) != (fill == (scenario->after ? 'a' : 0)))
        fail("the writer's record does not say what happened");
    at = "afterwards";
    delete_(&copy->survivor, bystander()); /* room for one, if there was none */
    delete_(&copy->survivor, other(0));
    if ((status = put(&copy->survivor, KEY, 'y', SMALL, SECOND)) != MF_OK)
        fail("a put of the key has status %d", status);
    if ((status = delete_(&copy->survivor, KEY)) != MF_OK)
        fail("a delete of the key has status %d", status);
    check_whole(copy);
    at = "the next state";
}

/* --- step by step ---------------------------------------------------------------------------------------- */

static pid_t start_victim(struct shared *shared) {
    pid_t child = fork();
    if (child == 0) {
        struct mf_memory memory;
        if (mf_map(&memory, shared->data, shared->control, scenario->participant) ||
            ptrace(PTRACE_TRACEME, 0, NULL, NULL))
            _exit(1);
        raise(SIGSTOP);
        scenario->act(&memory);
        raise(SIGSTOP);
        _exit(0);
    }
    return child;
}

static bool one_step(pid_t child) {
    int status;
    if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) || waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
        fail("the child cannot be traced, or ended with %x", status);
    step++;
    return WSTOPSIG(status) == SIGTRAP;
}

static unsigned run(struct shared *shared, struct shared *copy) {
    unsigned states = 0;
    int status;
    pid_t child = start_victim(shared);
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
        exit(NOT_TRACED);
    changed(&shared->survivor);
    do
        if (changed(&shared->survivor)) {
            states++;
            check_second_death(copy, &shared->survivor);
            check_state(copy, &shared->survivor);
        }
    while (one_step(child));
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return states;
}

/* --- scenarios ----------------------------------------------------------------------------------------------- */

static void nothing(struct shared *shared) {}

static void fill_the_heap(struct shared *shared) {
    for (unsigned i = 0;; i++) {
        char key[32];
        snprintf(key, sizeof key, "filling %u", i);
        if (put(&shared->survivor, key, 'f', SMALL, 0) == MF_FULL)
            return;
    }
}

/* Full, but many blocks are in limbo: the put has to harvest them. */
static void fill_with_limbo(struct shared *shared) {
    fill_the_heap(shared);
    for (unsigned i = 100; i < 400; i++) {
        char key[32];
        snprintf(key, sizeof key, "filling %u", i);
        delete_(&shared->survivor, key);
    }
}

static void put_small(struct mf_memory *memory) { put(memory, KEY, 'a', SMALL, SECOND); }
static void put_large(struct mf_memory *memory) { put(memory, KEY, 'a', LARGE, SECOND); }
static void put_impatiently(struct mf_memory *memory) { put(memory, KEY, 'a', SMALL, 0); }
static void delete_key(struct mf_memory *memory) { delete_(memory, KEY); }
static void get_key(struct mf_memory *memory) {
    uint32_t length;
    get(memory, KEY, &length);
}
/* A client died between the store of the slot and all that follows it; its span and lock are held. */
static void die_in_a_put(struct shared *shared) {
    static const struct scenario dying = {.name = "dying in a put", .participant = VICTIM, .act = put_large};
    const struct scenario *outer = scenario;
    int status;
    scenario = &dying;
    pid_t child = start_victim(shared);
    uint32_t length = 0;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
        exit(NOT_TRACED);
    while (length != LARGE && one_step(child)) {
        struct mf_op op; /* a look without a pin: nobody else is here */
        uint64_t slot;
        const struct mf_block *block;
        op.memory = &shared->survivor;
        op.hash = mf_hash_key(KEY, strlen(KEY), 0);
        op.space = 0;
        length = find(&op, KEY, strlen(KEY), &slot, &block) ? (uint32_t)block->value_len : 0;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    scenario = outer;
    step = 0;
}

static const struct scenario scenarios[] = {
    {"put-new", VICTIM, 0, SMALL, nothing, put_small, false},
    {"put-replacing", VICTIM, SMALL + 1, SMALL, nothing, put_small, false},
    {"put-large-replacing-small", VICTIM, SMALL, LARGE, nothing, put_large, false},
    {"put-small-replacing-large", VICTIM, LARGE, SMALL, nothing, put_small, false},
    {"put-full", VICTIM, 0, 0, fill_the_heap, put_impatiently, true},
    {"put-harvesting", VICTIM, SMALL, SMALL, fill_with_limbo, put_small, true},
    {"delete-small", VICTIM, SMALL, 0, nothing, delete_key, false},
    {"delete-large", VICTIM, LARGE, 0, nothing, delete_key, false},
    {"delete-absent", VICTIM, 0, 0, nothing, delete_key, false},
    {"get-large", VICTIM, LARGE, LARGE, nothing, get_key, false},
    {"function-put-new", 0, 0, SMALL, nothing, put_small, false},
    {"function-put-replacing", 0, SMALL + 1, SMALL, nothing, put_small, false},
    {"function-put-large", 0, SMALL, LARGE, nothing, put_large, false},
    {"function-delete-small", 0, SMALL, 0, nothing, delete_key, false},
    {"function-delete-large", 0, LARGE, 0, nothing, delete_key, false},
    {"function-reaping", 0, SMALL, LARGE, die_in_a_put, reap_victim, false},
};

static void prepare(struct shared *shared) {
    shared->survivor.control->participants[SURVIVOR].state = 1;
    shared->survivor.control->participants[VICTIM].state = 1;
    shared->survivor.control->writers[0].id = WRITER_ID;
    for (unsigned i = 0; i < OTHERS; i++)
        if (put(&shared->survivor, other(i), (uint8_t)(i + 1), length_of_other(i), SECOND) != MF_OK)
            fail("a put in an empty store");
    if (scenario->before && put(&shared->survivor, KEY, 'b', scenario->before, SECOND) != MF_OK)
        fail("a put in an empty store");
    scenario->prepare(shared);
}

int main(int count, char **arguments) {
    struct shared shared, copy;
    if (count < 2) {
        for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
            printf("%s\n", scenarios[i].name);
        return 0;
    }
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        if (strcmp(scenarios[i].name, arguments[1]) == 0)
            scenario = &scenarios[i];
    if (!scenario)
        return 2;
    for (unsigned fill = 0; fill < 256; fill++)
        memset(pattern[fill], (int)fill, LARGE);
    mf_geometry(MF_SHARD, MF_MIN_SHARD, &geometry);
    choose_watched();
    size_t length = 0;
    for (struct watched *w = watched; w->length; w++)
        length += w->length;
    last = calloc(1, length);
    open_shared(&shared, true);
    open_shared(&copy, true);
    map_shared(&shared);
    map_shared(&copy);
    prepare(&shared);
    unsigned states = run(&shared, &copy);
    printf("%u states in %lu steps\n", states, (unsigned long)step);
    return 0;
}
