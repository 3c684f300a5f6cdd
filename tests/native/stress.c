/* Everything at once on one small shard, for the sanitizers: `stress MODE SECONDS`.
 *
 * threads: mapped clients, tcp clients whose connections break, scans, and clients that "die" (they
 *     go away in the middle of a put and are reaped), all in one process, so that a sanitizer sees it.
 * contended: clients that want the same two locks all the time, with nobody to wake them but each other.
 * processes: clients are killed, hundreds of times a second, and reaped; others must not notice.
 *
 * move: as threads, while the shard is copied again and again; each copy must be what the shard then is.
 * punch: as threads, while free spans are cut out and given back; and now and then it is copied.
 * garbled: copies with wrong bytes in them arrive.
 *
 * hostile: as threads, while a process of the same tenant writes nonsense everywhere. Then any result
 *     is right, as long as nobody crashes, hangs, or reads what it must not.
 *
 * Every value tells its length and the key that it was put for, so that a wrong byte shows. */
#define _GNU_SOURCE
#include "fsck.c"
#include "wire.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define KEYS 24u
#define CONTENDED_KEYS 2u
#define LONGEST 300000u
#define SECOND 1000000000ll
#define SHM_THREADS 3u
#define TCP_THREADS 3u
#define DYING 8u /* participants from here on are those that die */

static uint64_t keys[KEYS]; /* of one home group, so that they quarrel over its slots */
static const uint32_t lengths[] = {8, 16, 100, 100, 500, 3000, 60000, 70000, LONGEST};
static struct mf_memory memory; /* the function's; the threads of clients use the same mapping, */
static struct mf_memory unused; /* by copies of this one */
static int data_fd, control_fd;
static struct mf_server *server;
static _Atomic bool stop;
static bool hostile, contended, moves, punches;
static int64_t timeout = 20 * SECOND;
static _Atomic uint64_t operations, resumed, deaths, copies, cuts;

/* Something that cannot be, unless somebody is hostile. */
static void fail(const char *what, long a, long b) {
    if (hostile)
        return;
    fprintf(stderr, "%s (%ld, %ld)\n", what, a, b);
    fflush(stderr);
    _exit(1);
}

/* --- values ----------------------------------------------------------------------------------------- */

struct client {
    struct mf_link link;
    uint64_t random;
    uint64_t *value, *got; /* buffers */
    uint8_t *scanned, meta[MF_MAX_META];
};

static uint64_t draw(struct client *client) { /* xorshift64* (Vigna) */
    client->random ^= client->random >> 12;
    client->random ^= client->random << 25;
    client->random ^= client->random >> 27;
    return client->random * 0x2545f4914f6cdd1dull >> 16;
}

static uint32_t make_value(struct client *client, uint64_t number) {
    uint32_t length = lengths[draw(client) % (sizeof lengths / sizeof *lengths)];
    uint64_t word = draw(client) << 40 | (uint64_t)length << 8 | number;
    for (uint32_t i = 0; i < length / 8; i++)
        client->value[i] = word;
    return length;
}

static void check_value(const uint64_t *value, uint64_t number, uint64_t length) {
    if (hostile)
        return;
    if (length < 8 || (value[0] & 0xff) != number || (value[0] >> 8 & 0xffffffff) != length)
        fail("a get returned what nobody put for this key", (long)number, (long)length);
    for (uint64_t i = 1; i < length / 8; i++)
        if (value[i] != value[0])
            fail("a get returned two values in one", (long)i, (long)length);
}

/* --- clients ---------------------------------------------------------------------------------------------- */

static int chaos[64]; /* copies of the clients' sockets, to be shut down at random */
static _Atomic unsigned connections;

static void connect_tcp(struct client *client) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        abort();
    int copy = dup(ends[0]), place = (int)(atomic_fetch_add(&connections, 1) % 64);
    int old = __atomic_exchange_n(&chaos[place], copy, __ATOMIC_ACQ_REL);
    if (old)
        close(old);
    int error = mf_server_serve(server, ends[1], NULL);
    if (error || mf_pool_add(client->link.pool, ends[0], NULL))
        abort();
}

/* Whether to try again. */
static bool mend(struct client *client, int status) {
    if (status == MF_FROZEN)
        return moves || punches; /* for the length of a copy */
    if (client->link.fabric == MF_SHM || (status != MF_BROKEN && status != MF_NEED_CONNECTION))
        return false;
    connect_tcp(client);
    return true;
}

static void get_one(struct client *client, uint64_t number) {
    uint64_t key = keys[number];
    struct mf_got got;
    int status;
    do {
        status = mf_link_get(&client->link, true, 0, &key, sizeof key, &got);
        uint64_t length = got.value_len;
        if (status == MF_OK && length > LONGEST) {
            fail("a value is longer than any that was put", (long)length, 0);
            status = MF_CORRUPT;
        } else if (status == MF_OK) {
            status = mf_link_take(&client->link, &got, client->got, client->meta);
        }
        mf_link_leave(&client->link, &got);
        if (status == MF_OK)
            check_value(client->got, number, length);
    } while (mend(client, status));
    if (status != MF_OK && status != MF_ABSENT)
        fail("a get failed", status, client->link.fabric == MF_SHM);
}

static void change_one(struct client *client, uint64_t number, bool delete_) {
    uint64_t key = keys[number];
    struct mf_putting put = {.key = &key, .key_len = sizeof key, .value = client->value};
    int status;
    if (!delete_)
        put.value_len = make_value(client, number);
    do {
        atomic_fetch_add(&resumed, put.change.id != 0);
        status = delete_ ? mf_link_delete(&client->link, true, &put) : mf_link_put(&client->link, true, &put);
    } while (mend(client, status));
    if (status != MF_OK && status != (delete_ ? MF_ABSENT : MF_FULL))
        fail("a change failed", status, delete_);
}

static void scan_all(struct client *client) {
    const size_t room = MF_GROUP * (16 + MF_MAX_KEY);
    uint8_t *out = client->scanned;
    uint64_t cursor = 0, before;
    size_t length;
    do {
        int status;
        before = cursor;
        do
            status = mf_link_scan(&client->link, 0, &cursor, out, room, &length);
        while (mend(client, status));
        if (status != MF_OK)
            return fail("a scan failed", status, 0);
        for (size_t at = 0; at < length; at += 16 + sizeof(uint64_t)) {
            uint32_t key_len;
            memcpy(&key_len, out + at, sizeof key_len);
            if (key_len != sizeof(uint64_t))
                return fail("a scan returned a key of another length", key_len, 0);
        }
    } while (cursor && cursor != before);
}

static void work(struct client *client) {
    uint64_t number = draw(client) % (contended ? CONTENDED_KEYS : KEYS), what = draw(client) % 100;
    if (what < 45)
        get_one(client, number);
    else if (what < 85)
        change_one(client, number, false);
    else if (what < 98)
        change_one(client, number, true);
    else
        scan_all(client);
    atomic_fetch_add_explicit(&operations, 1, memory_order_relaxed);
}

static void open_client(struct client *client, uint32_t participant, uint64_t seed) {
    *client = (struct client){.random = seed * 0x9e3779b97f4a7c15ull + 1};
    client->value = malloc(LONGEST);
    client->got = malloc(LONGEST);
    client->scanned = malloc(MF_GROUP * (16 + MF_MAX_KEY));
    client->link.timeout = timeout;
    if (participant) {
        client->link.fabric = MF_SHM;
        client->link.memory = unused;
        client->link.memory.participant = participant;
    } else {
        client->link.fabric = MF_TCP;
        client->link.pool = mf_pool_new(timeout);
    }
}

static void close_client(struct client *client) {
    if (client->link.pool)
        mf_pool_free(client->link.pool);
    free(client->value);
    free(client->got);
    free(client->scanned);
}

/* --- in one process ------------------------------------------------------------------------------------ */

static void *run_client(void *argument) {
    struct client client;
    uintptr_t number = (uintptr_t)argument;
    open_client(&client, number <= SHM_THREADS ? (uint32_t)number : 0, number);
    while (!atomic_load_explicit(&stop, memory_order_relaxed))
        work(&client);
    close_client(&client);
    return NULL;
}

/* Dies in the middle of a put, with blocks taken, pinned, and perhaps the key's lock. */
static void *run_dying(void *argument) {
    struct client client;
    open_client(&client, DYING, 99);
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        struct mf_op op;
        uint64_t key = keys[draw(&client) % KEYS];
        work(&client);
        mf_op_begin(&op, &client.link.memory, timeout);
        if (mf_put_reserve_spans(&op, sizeof key, 0, draw(&client) % 2 ? LONGEST : 70000) == MF_OK &&
            draw(&client) % 2 && mf_put_reserve_rest(&op) == MF_OK && draw(&client) % 2)
            mf_lock(&op, stripe_of(mf_hash_key(&key, sizeof key, 0)));
        mf_reap(&memory, DYING);
        int64_t due = mf_now() + timeout;
        while (mf_put_right(&memory, due)) /* also when the shard is frozen */
            if (mf_now() > due)
                fail("not everything could be put right", 0, 0);
        atomic_fetch_add(&deaths, 1);
    }
    close_client(&client);
    return NULL;
}

/* Keeps a lock for so long that the others go to sleep. */
static void *run_holder(void *argument) {
    struct client client;
    open_client(&client, DYING, 99);
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        struct mf_op op;
        uint64_t key = keys[draw(&client) % CONTENDED_KEYS];
        mf_op_begin(&op, &client.link.memory, timeout);
        if (mf_pin(&op) != MF_OK || mf_lock(&op, stripe_of(mf_hash_key(&key, sizeof key, 0))) != MF_OK)
            fail("a lock cannot be had", 0, 0);
        mf_nap(300000);
        mf_op_end(&op);
    }
    close_client(&client);
    return NULL;
}

/* --- copies to another memory ------------------------------------------------------------------------------- */

/* Whoever copies reads what is being written, and reads it again when it was: no race to be reported. Those
 * who compare afterwards read what may not be written any more. */
void AnnotateIgnoreReadsBegin(const char *file, int line) __attribute__((weak));
void AnnotateIgnoreReadsEnd(const char *file, int line) __attribute__((weak));

static void while_it_is_written(bool begins) {
    if (AnnotateIgnoreReadsBegin)
        (begins ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd)(__FILE__, __LINE__);
}

struct arrival {
    struct mf_memory memory;
    int data_fd, control_fd, socket, error;
};

static void make_memory(struct mf_memory *into, int *data, int *control, enum mf_state state) {
    struct mf_header header;
    mf_geometry(MF_SHARD, 2 * MF_MIN_SHARD, &header);
    *data = memfd_create("memfaas-stress-data", MFD_CLOEXEC);
    *control = memfd_create("memfaas-stress-control", MFD_CLOEXEC);
    if (ftruncate(*data, (off_t)header.data_bytes) || ftruncate(*control, (off_t)header.control_bytes) ||
        mf_format(*data, *control, &header, state) || mf_map(into, *data, *control, 0))
        fail("no memory", errno, 0);
}

static void drop_memory(struct arrival *arrival) {
    mf_unmap(&arrival->memory);
    close(arrival->data_fd);
    close(arrival->control_fd);
}

static void *run_receiver(void *argument) {
    struct arrival *arrival = argument;
    struct mf_copy copy = {.fd = arrival->socket, .deadline = mf_now() + timeout};
    arrival->error = mf_receive(&arrival->memory, &copy, arrival->data_fd);
    shutdown(arrival->socket, SHUT_RDWR);
    return NULL;
}

/* Bytes of the value's head block, with all that follows the header in it. */
static size_t block_length(const struct mf_op *op) {
    size_t length = sizeof(struct mf_block) + op->key_len + op->meta_len;
    if (op->chunks == 0)
        return length + op->value_len;
    return ALIGN8(length) + op->segments * sizeof *op->sums + op->chunks * sizeof(struct mf_chunk);
}

/* Nothing runs on either memory. */
static void compare(struct mf_memory *there) {
    for (uint32_t i = 0; i < MF_STRIPES; i++)
        if (there->control->stripes[i].version != memory.control->stripes[i].version)
            fail("a version is not what it was", i, 0);
    for (uint32_t i = 0; i < MF_WRITERS; i++) {
        uint64_t id = memory.control->writers[i].id, done_ = memory.control->writers[i].done;
        for (uint32_t n = 0; id && done_; n++) { /* a new connection may take the record right now */
            if (n == MF_WRITERS)
                fail("what a connection did is forgotten", i, 0);
            if (there->control->writers[n].id == id && there->control->writers[n].done == done_)
                break;
        }
    }
    for (uint64_t i = 0; i < memory.at.groups * MF_GROUP; i++) {
        uint64_t slot = group_at(&memory, 0)[i];
        struct mf_op op = {.memory = &memory};
        if (group_at(there, 0)[i] != slot)
            fail("a slot is not what it was", (long)i, 0);
        if (!slot)
            continue;
        if (!open_block(&op, block_at(&memory, mf_slot_offset(slot))))
            fail("a slot leads to nothing", (long)i, 0);
        if (memcmp(op.block, there->data + mf_slot_offset(slot), block_length(&op)))
            fail("a block is not what it was", (long)i, (long)mf_slot_offset(slot));
        for (uint32_t c = 0; op.chunks && c < op.pieces; c++) {
            const uint8_t *piece = op.piece[c].iov_base;
            if (memcmp(piece, there->data + (piece - memory.data), op.piece[c].iov_len))
                fail("a piece is not what it was", (long)i, c);
        }
    }
}

static void check_arrived(struct arrival *arrival) {
    struct report r;
    mf_thaw(&arrival->memory);
    if (mf_put_right(&arrival->memory, mf_now() + timeout) || fsck(arrival->data_fd, arrival->control_fd, &r))
        fail("the copy cannot be put right", 0, 0);
    if (r.locks || r.pins || r.spans || r.broken || r.shared || r.leaked || r.dangling || r.counted_wrong || r.limbo ||
        r.unproved)
        fail("the copy is not whole", (long)r.leaked, (long)r.broken);
}

/* One copy, to its end or (`rounds` 0) given up. The shard stays where it is. */
static void copy_once(uint64_t rounds) {
    struct arrival arrival = {.error = 0};
    pthread_t receiver;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        abort();
    make_memory(&arrival.memory, &arrival.data_fd, &arrival.control_fd, MF_STATE_FROZEN);
    arrival.socket = ends[1];
    pthread_create(&receiver, NULL, run_receiver, &arrival);
    struct mf_copy copy = {.fd = ends[0], .deadline = mf_now() + timeout};
    while_it_is_written(true);
    mf_copy_all(&memory);
    int error = mf_copy_written(&memory, &copy);
    for (uint64_t i = 1; !error && i < rounds; i++)
        error = mf_copy_written(&memory, &copy);
    if (rounds) {
        mf_freeze(&memory);
        if (!mf_drain(&memory, mf_now() + timeout))
            fail("an operation does not end", 0, 0);
        error = error ? error : mf_copy_rest(&memory, &copy);
    }
    while_it_is_written(false);
    shutdown(ends[0], SHUT_WR);
    pthread_join(receiver, NULL);
    if (error || arrival.error != (rounds ? 0 : ECONNRESET))
        fail("a copy failed", error, arrival.error);
    if (rounds)
        compare(&arrival.memory);
    mf_thaw(&memory);
    if (rounds)
        check_arrived(&arrival);
    close(ends[0]);
    close(ends[1]);
    drop_memory(&arrival);
    atomic_fetch_add(&copies, 1);
}

static void *run_mover(void *argument) {
    struct client client = {.random = 77};
    (void)argument;
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        copy_once(draw(&client) % 4);
        mf_nap((int64_t)(draw(&client) % 5000000));
    }
    return NULL;
}

static void *run_puncher(void *argument) {
    struct client client = {.random = 78};
    (void)argument;
    for (uint64_t i = 0; !atomic_load_explicit(&stop, memory_order_relaxed); i++) {
        int64_t patience = draw(&client) % 4 ? 0 : 2000000;
        if (mf_punch(&memory, data_fd, (1 + draw(&client) % 24) * MF_SPAN, mf_now() + patience))
            atomic_fetch_add(&cuts, 1);
        mf_nap((int64_t)(draw(&client) % 500000));
        if (draw(&client) % 2)
            mf_unpunch(&memory, -1);
        if (i % 64 == 0)
            copy_once(2);
    }
    mf_unpunch(&memory, -1);
    return NULL;
}

/* --- copies that are garbled --------------------------------------------------------------------------------- */

struct recording {
    uint8_t *bytes;
    size_t length, room;
    int socket;
};

static void *run_recorder(void *argument) {
    struct recording *recording = argument;
    for (;;) {
        ssize_t got = recv(recording->socket, recording->bytes + recording->length,
                           recording->room - recording->length, 0);
        if (got <= 0)
            return NULL;
        recording->length += (size_t)got;
    }
}

static void record(struct recording *recording) {
    pthread_t thread;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        abort();
    *recording = (struct recording){.room = 32u << 20, .socket = ends[1]};
    recording->bytes = malloc(recording->room);
    pthread_create(&thread, NULL, run_recorder, recording);
    struct mf_copy copy = {.fd = ends[0], .deadline = mf_now() + timeout};
    mf_copy_all(&memory);
    mf_freeze(&memory);
    if (mf_copy_rest(&memory, &copy))
        fail("a copy failed", 0, 0);
    mf_thaw(&memory);
    shutdown(ends[0], SHUT_WR);
    pthread_join(thread, NULL);
    close(ends[0]);
    close(ends[1]);
}

/* Where its frames begin; returns how many. */
static size_t frames_of(const struct recording *recording, size_t *starts, size_t most) {
    size_t count = 0;
    for (size_t at = 0; at < recording->length && count < most;) {
        uint64_t length;
        memcpy(&length, recording->bytes + at + 16, sizeof length);
        starts[count++] = at;
        at += 24 + length;
    }
    return count;
}

static void garble(struct client *client, uint8_t *bytes, const size_t *starts, size_t count) {
    for (uint64_t i = 1 + draw(client) % 3; i; i--) {
        size_t frame = draw(client) % count, length = (frame + 1 < count ? starts[frame + 1] : starts[frame] + 24) - starts[frame];
        uint64_t place = draw(client) % 4, word;
        size_t at = starts[frame] + (place < 3 ? 8 * place : draw(client) % (length / 8) * 8);
        memcpy(&word, bytes + at, sizeof word);
        switch (draw(client) % 5) {
        case 0:
            word = draw(client) << 32 ^ draw(client);
            break;
        case 1:
            word = draw(client) % 8;
            break;
        case 2:
            word += draw(client) % 3 - 1;
            break;
        case 3:
            word ^= 1ull << draw(client) % 64;
            break;
        default:
            word = UINT64_MAX - draw(client) % 9000000;
        }
        memcpy(bytes + at, &word, sizeof word);
    }
}

/* Whatever came, the memory is used afterwards: any result is right. */
static void use_garbled(struct client *client, struct arrival *arrival) {
    mf_thaw(&arrival->memory);
    mf_reap(&arrival->memory, 0);
    mf_put_right(&arrival->memory, mf_now() + SECOND / 100);
    client->link.memory = arrival->memory;
    for (int i = 0; i < 100; i++)
        work(client);
}

static void run_garbled(int64_t until) {
    struct client client;
    struct recording recording;
    size_t starts[64];
    open_client(&client, 1, 3);
    for (int i = 0; i < 200; i++)
        work(&client);
    record(&recording);
    size_t count = frames_of(&recording, starts, 64);
    uint8_t *bytes = malloc(recording.length);
    hostile = true; /* what is read is not what was put */
    timeout = client.link.timeout = SECOND / 50;
    alarm(90); /* ends us if anything hangs */
    while (mf_now() < until) {
        struct arrival arrival = {.error = 0};
        pthread_t receiver;
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
            abort();
        memcpy(bytes, recording.bytes, recording.length);
        garble(&client, bytes, starts, count);
        make_memory(&arrival.memory, &arrival.data_fd, &arrival.control_fd, MF_STATE_FROZEN);
        arrival.socket = ends[1];
        pthread_create(&receiver, NULL, run_receiver, &arrival);
        for (size_t at = 0; at < recording.length;) {
            ssize_t sent = send(ends[0], bytes + at, recording.length - at, MSG_NOSIGNAL);
            if (sent <= 0)
                break;
            at += (size_t)sent;
        }
        shutdown(ends[0], SHUT_WR);
        pthread_join(receiver, NULL);
        use_garbled(&client, &arrival);
        close(ends[0]);
        close(ends[1]);
        drop_memory(&arrival);
        atomic_fetch_add(&copies, 1);
    }
    free(bytes);
    free(recording.bytes);
    client.link.memory = unused;
    close_client(&client);
}

static void break_connections(int64_t until) {
    unsigned place = 0;
    while (mf_now() < until) {
        mf_nap(2000000);
        if (contended)
            continue;
        int copy = __atomic_exchange_n(&chaos[place++ % 64], 0, __ATOMIC_ACQ_REL);
        if (copy) {
            shutdown(copy, SHUT_RDWR);
            close(copy);
        }
    }
}

static void run_threads(int64_t until) {
    pthread_t threads[SHM_THREADS + TCP_THREADS], dying, other;
    server = mf_server_new(&memory);
    for (uintptr_t i = 0; i < SHM_THREADS + TCP_THREADS; i++)
        pthread_create(&threads[i], NULL, run_client, (void *)(i + 1));
    pthread_create(&dying, NULL, contended ? run_holder : run_dying, NULL);
    if (moves || punches)
        pthread_create(&other, NULL, moves ? run_mover : run_puncher, NULL);
    break_connections(until);
    atomic_store(&stop, true);
    if (moves || punches)
        pthread_join(other, NULL);
    for (uintptr_t i = 0; i < SHM_THREADS + TCP_THREADS; i++)
        pthread_join(threads[i], NULL);
    pthread_join(dying, NULL);
    for (unsigned i = 0; i < 64; i++)
        if (chaos[i])
            close(chaos[i]);
    if (!mf_server_stop(server, 30 * SECOND))
        abort();
    mf_server_free(server);
}

/* --- processes that are killed ------------------------------------------------------------------------------ */

#define VICTIMS 4u
#define SURVIVORS 2u

static void *run_second_thread(void *argument) {
    for (;;)
        work(argument);
    return NULL;
}

static uint64_t own_key(uint32_t participant) { return UINT64_MAX - participant; }

/* What a victim knows of a key of its own, in memory that outlives it. */
struct progress {
    _Atomic uint64_t begun, done;
};
static struct progress *progress;

static void live(uint32_t participant, uint64_t seed) {
    struct client first, second;
    pthread_t thread;
    open_client(&first, participant, seed);
    open_client(&second, participant, seed + 1);
    pthread_create(&thread, NULL, run_second_thread, &second);
    uint64_t key = own_key(participant);
    for (uint64_t i = 0;; i++) {
        work(&first);
        if (participant < DYING || i % 4)
            continue;
        uint64_t next = atomic_load(&progress[participant].done) + 1;
        struct mf_putting put = {
            .key = &key, .key_len = sizeof key, .value = &next, .value_len = sizeof next};
        atomic_store(&progress[participant].begun, next);
        int status = mf_link_put(&first.link, true, &put);
        if (status == MF_OK)
            atomic_store(&progress[participant].done, next);
        else if (status != MF_FULL)
            fail("a put failed", status, 0);
    }
}

static pid_t start_process(uint32_t participant, uint64_t seed) {
    pid_t child = fork();
    if (child)
        return child;
    unused.generation = mf_fork_generation(); /* the mapping is inherited, and used as another participant */
    live(participant, seed);
    _exit(0);
}

static void bury(uint32_t participant, pid_t child) {
    int status;
    kill(child, SIGKILL);
    if (waitpid(child, &status, 0) != child || !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        fail("a client ended by itself", status, participant);
    mf_reap(&memory, participant);
    atomic_fetch_add(&deaths, 1);
}

static void check_progress(struct client *function, uint32_t participant) {
    uint64_t key = own_key(participant), value = 0, begun = atomic_load(&progress[participant].begun),
             done = atomic_load(&progress[participant].done);
    struct mf_op op;
    mf_op_begin(&op, &function->link.memory, timeout);
    int status = mf_get(&op, &key, sizeof key);
    if (status == MF_OK)
        status = mf_get_copy(&op, &value, NULL);
    mf_op_end(&op);
    if (status != MF_OK && status != MF_ABSENT)
        fail("the function cannot get", status, participant);
    if (value != done && value != begun)
        fail("an acknowledged value is lost", (long)value, (long)done);
    atomic_store(&progress[participant].done, value);
}

static void run_processes(int64_t until) {
    pid_t survivors[SURVIVORS], victims[VICTIMS];
    struct client function;
    uint64_t seed = 10;
    progress = mmap(NULL, MF_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (uint32_t i = 0; i < SURVIVORS; i++)
        survivors[i] = start_process(1 + i, seed += 2);
    for (uint32_t i = 0; i < VICTIMS; i++)
        victims[i] = start_process(DYING + i, seed += 2);
    open_client(&function, DYING - 1, 1);
    while (mf_now() < until) {
        uint32_t burst = draw(&function) % 8 ? 1 : VICTIMS, from = (uint32_t)(draw(&function) % VICTIMS);
        mf_nap((int64_t)(draw(&function) % 4000000));
        for (uint32_t i = 0; i < burst; i++)
            bury(DYING + (from + i) % VICTIMS, victims[(from + i) % VICTIMS]);
        if (mf_put_right(&memory, mf_now() + timeout))
            fail("not everything could be put right", 0, 0);
        for (uint32_t i = 0; i < burst; i++) {
            uint32_t number = (from + i) % VICTIMS;
            check_progress(&function, DYING + number);
            victims[number] = start_process(DYING + number, seed += 2);
        }
    }
    for (uint32_t i = 0; i < SURVIVORS; i++)
        bury(1 + i, survivors[i]);
    for (uint32_t i = 0; i < VICTIMS; i++)
        bury(DYING + i, victims[i]);
    if (mf_put_right(&memory, mf_now() + timeout))
        fail("not everything could be put right", 0, 0);
    close_client(&function);
}

/* --- a hostile process --------------------------------------------------------------------------------------- */

static uint64_t nonsense(struct client *client, const uint64_t *near) {
    switch (draw(client) % 6) {
    case 0:
        return draw(client) << 24 ^ draw(client);
    case 1:
        return draw(client) % 1100; /* a participant, a class, a count */
    case 2:
        return *near + draw(client) % 3 - 1;
    case 3:
        return *near ^ 1ull << draw(client) % 64;
    case 4:
        return memory.at.heap + draw(client) % memory.at.size; /* an offset */
    default:
        return draw(client) % 2 ? 0 : UINT64_MAX;
    }
}

/* A block whose sums are right, though what it says is not. */
static void forge(struct client *client) {
    uint64_t slot = group_at(&memory, draw(client) % memory.at.groups)[draw(client) % MF_GROUP];
    struct mf_block *block = slot ? (struct mf_block *)block_at(&memory, mf_slot_offset(slot)) : NULL;
    struct mf_op op = {.memory = &memory};
    if (!block || !open_block(&op, block))
        return;
    uint8_t *table = (uint8_t *)block + ALIGN8(sizeof *block + block->key_len + block->meta_len);
    size_t length = op.segments * sizeof *op.sums + op.chunks * sizeof(struct mf_chunk);
    if (op.chunks && draw(client) % 2) {
        uint64_t *word = (uint64_t *)table + draw(client) % (length / 8);
        *word = nonsense(client, word);
        if (draw(client) % 2)
            ((uint32_t *)word)[0] = (uint32_t)(draw(client) % 70000); /* the length of a chunk, perhaps */
        block->checksum = table_sum(op.meta, op.meta_len, table, length);
    } else {
        uint64_t *word = (uint64_t *)block + draw(client) % 7;
        *word = nonsense(client, word);
    }
    block->header_sum = head_sum(&memory, block);
}

/* Puts the control memory back now and then: else every lock is soon closed for good, and nothing more
 * is tried. */
static void run_hostile(void) {
    struct client client;
    open_client(&client, 20, 5);
    uint8_t *good = malloc(memory.control_bytes);
    memcpy(good, memory.control, memory.control_bytes);
    for (;;) {
        for (uint64_t i = draw(&client) % 100; i; i--) {
            uint64_t *control = (uint64_t *)memory.control + draw(&client) % (memory.control_bytes / 8);
            uint64_t *index = (uint64_t *)group_at(&memory, 0) + draw(&client) % (memory.at.groups * MF_GROUP);
            uint64_t *heap = (uint64_t *)(memory.data + memory.at.heap) + draw(&client) % (memory.at.size / 8);
            uint64_t what = draw(&client) % 8;
            uint64_t *word = what < 2 ? control : what < 3 ? index : heap;
            if (what < 4)
                *word = nonsense(&client, word);
            else
                forge(&client);
        }
        mf_nap((int64_t)(draw(&client) % 200000));
        if (draw(&client) % 4 == 0)
            memcpy(memory.control, good, memory.control_bytes);
    }
}

static void run_with_hostile(int64_t until) {
    int status;
    hostile = true;
    timeout = SECOND / 20;
    pid_t child = fork();
    if (child == 0) {
        unused.generation = mf_fork_generation();
        run_hostile();
    }
    alarm(90); /* ends us if anything hangs */
    run_threads(until);
    kill(child, SIGKILL);
    if (waitpid(child, &status, 0) != child || !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        abort();
}

/* --- afterwards ------------------------------------------------------------------------------------------ */

static void check_end(void) {
    struct report r;
    struct client client;
    uint64_t used, free_spans;
    if (fsck(data_fd, control_fd, &r))
        fail("fsck", 0, 0);
    if (r.locks || r.pins || r.spans || r.broken || r.shared || r.leaked || r.dangling || r.counted_wrong ||
        r.unproved) {
        fprintf(stderr,
                "locks %lu pins %lu spans %lu broken %lu shared %lu leaked %lu dangling %lu counted wrong %lu "
                "unproved %lu\n",
                r.locks, r.pins, r.spans, r.broken, r.shared, r.leaked, r.dangling, r.counted_wrong, r.unproved);
        fail("the shard is not whole", 0, 0);
    }
    open_client(&client, 1, 1);
    for (uint64_t number = 0; number < KEYS; number++)
        change_one(&client, number, true);
    for (uint32_t participant = DYING; participant < DYING + VICTIMS; participant++) {
        keys[0] = own_key(participant);
        change_one(&client, 0, true);
    }
    mf_heap_stats(&memory, &used, &free_spans);
    if (used)
        fail("the empty heap has blocks in use", (long)used, 0);
    close_client(&client);
}

static void choose_keys(void) {
    unsigned found = 0;
    for (uint64_t key = 0; found < KEYS; key++)
        if (mf_home_group(&memory.at, mf_hash_key(&key, sizeof key, 0)) == 0)
            keys[found++] = key;
}

int main(int count, char **arguments) {
    if (count != 3)
        return 2;
    int64_t until = mf_now() + atoll(arguments[2]) * SECOND;
    make_memory(&memory, &data_fd, &control_fd, MF_STATE_SERVING);
    unused = memory;
    choose_keys();
    if (strcmp(arguments[1], "hostile") == 0)
        run_with_hostile(until);
    else if (strcmp(arguments[1], "processes") == 0)
        run_processes(until);
    else if (strcmp(arguments[1], "garbled") == 0)
        run_garbled(until);
    else {
        moves = strcmp(arguments[1], "move") == 0;
        punches = strcmp(arguments[1], "punch") == 0;
        contended = strcmp(arguments[1], "contended") == 0;
        run_threads(until);
    }
    if (!hostile)
        check_end();
    mf_unmap(&memory);
    printf("%lu operations, %lu deaths, %lu resumed, %lu copies, %lu cuts\n", (unsigned long)operations,
           (unsigned long)deaths, (unsigned long)resumed, (unsigned long)copies, (unsigned long)cuts);
    return 0;
}
