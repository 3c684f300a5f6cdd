/* The verbs fabric: a tcp connection with a queue pair beside it.
 *
 * What is rare goes over the connection, with the frames of wire.h; it also tells either side of the other's end. What
 * is hot goes over the queue pair: the client reads blocks, and reads and writes regions, one-sided. To
 * change a store it writes into what the function has lent it, its landing area and reserved spans, and sends a
 * request behind it, which one thread of the function executes.
 *
 * The memory is registered in chunks, ahead or when first used, each with a key of its own (verbs_chunks.c); all that a
 * function registers is in one protection domain, so its clients reach its own lease and their landing areas, and
 * nothing else. */
#ifndef MEMFAAS_VERBS_H
#define MEMFAAS_VERBS_H

#include <errno.h>
#include <infiniband/verbs.h>

#include "wire.h"

struct connection;

#define MF_VERBS_VERSION 1u
#define MF_CHUNK (64ull << 20) /* bytes of DATA under one key */
#define MF_SLOT 1024u          /* bytes of one message, at most */
#define MF_SLOTS 40u           /* messages that may be under way in each direction */
#define MF_LANDING (384u << 10)
#define MF_TAIL_MAX (MF_LANDING - MF_SPAN) /* key, meta and sums, beside the last bytes of a value */
_Static_assert(MF_SLOTS > MF_REMEMBERED, "as many as may be under way, and some");
_Static_assert(MF_CHUNK % MF_SPAN == 0, "no block lies in two chunks");
_Static_assert(MF_MAX_KEY + MF_MAX_META + MF_MAX_SEGMENTS * 8 <= MF_TAIL_MAX, "all but the value's spans fits");

#define MF_WHY 200u /* bytes of the reason why something can't be had */

/* verbs_api.c: libibverbs, which may not be installed, and a device of it. */
struct mf_verbs_api {
    struct ibv_device **(*get_device_list)(int *);
    void (*free_device_list)(struct ibv_device **);
    const char *(*get_device_name)(struct ibv_device *);
    struct ibv_context *(*open_device)(struct ibv_device *);
    int (*close_device)(struct ibv_context *);
    int (*query_device)(struct ibv_context *, struct ibv_device_attr *);
    int (*query_port)(struct ibv_context *, uint8_t, struct ibv_port_attr *);
    int (*query_gid)(struct ibv_context *, uint8_t, int, union ibv_gid *);
    struct ibv_pd *(*alloc_pd)(struct ibv_context *);
    int (*dealloc_pd)(struct ibv_pd *);
    struct ibv_mr *(*reg_mr)(struct ibv_pd *, void *, size_t, int);
    int (*dereg_mr)(struct ibv_mr *);
    struct ibv_comp_channel *(*create_comp_channel)(struct ibv_context *);
    int (*destroy_comp_channel)(struct ibv_comp_channel *);
    struct ibv_cq *(*create_cq)(struct ibv_context *, int, void *, struct ibv_comp_channel *, int);
    int (*destroy_cq)(struct ibv_cq *);
    int (*get_cq_event)(struct ibv_comp_channel *, struct ibv_cq **, void **);
    void (*ack_cq_events)(struct ibv_cq *, unsigned);
    struct ibv_qp *(*create_qp)(struct ibv_pd *, struct ibv_qp_init_attr *);
    int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);
    int (*destroy_qp)(struct ibv_qp *);
    bool fork_safe; /* what is registered stays the parent's when a process forks */
};
extern struct mf_verbs_api mf_verbs; /* filled once a device was opened */

struct mf_device {
    struct ibv_context *context;
    char name[80]; /* device:port:gid index */
    uint8_t port;
    uint8_t gid_index;
    union ibv_gid gid;
    uint16_t lid;
    bool ethernet;
    bool atomics;
    enum ibv_mtu mtu;
    uint8_t reads;       /* at once, that it answers */
    uint8_t reads_asked; /* at once, that it asks for */
    struct mf_device *next;
};
/* Of this process, and never closed. `wanted`: device:port:gid index. NULL: `why` says it. */
struct mf_device *mf_device_open(const char *wanted, char *why);

/* verbs_queue.c: a reliable connection between two devices. */
struct mf_address { /* what either end tells the other */
    uint32_t version;
    uint32_t qp;
    uint32_t psn;
    uint16_t lid;
    uint8_t mtu;
    uint8_t reads;
    uint8_t gid[16];
};
struct mf_welcome { /* what the function tells besides */
    struct mf_address address;
    uint64_t generation; /* keys of one generation belong together */
    uint64_t kind, size; /* of the memory */
    uint64_t data;       /* address of DATA */
    uint64_t landing;
    uint32_t landing_key;
    uint32_t first_key; /* of the first chunk */
};

struct mf_pair {
    struct mf_device *device;
    struct ibv_qp *qp;
    struct ibv_cq *cq;
    uint32_t psn;
    uint32_t inline_max;
};
#define MF_SENDS 128u /* work requests in a send queue */
/* 0 or an errno. */
int mf_pair_make(struct mf_pair *pair, struct mf_device *device, struct ibv_pd *pd, struct ibv_comp_channel *channel,
                 void *context);
int mf_pair_connect(struct mf_pair *pair, const struct mf_address *peer, unsigned access);
struct mf_address mf_pair_address(const struct mf_pair *pair);
bool mf_address_good(const struct mf_address *address);
void mf_pair_free(struct mf_pair *pair);
uint8_t *mf_buffer_make(size_t size); /* not for a forked child: its pages stay where the device knows them */
void mf_buffer_free(uint8_t *buffer, size_t size);

/* verbs_dial.c: the client's side. */
struct mf_remote { /* what a verbs link knows of the memory at its other end */
    struct mf_device *device;
    struct ibv_pd *pd;
    struct mf_memory memory; /* its geometry; nothing is mapped */
    uint64_t data, generation;
    uint32_t chunks;
    _Atomic uint64_t *keys;    /* by chunk: 1 << 32 | key; 0: not known */
    _Atomic uint64_t *places;  /* slots by hash, as they were last seen */
    _Atomic uint32_t atomics;  /* enum mf_atomics, as the function said */
    _Atomic uint64_t refused;  /* times that the device did not take memory of the caller's */
    _Atomic int refusal;       /* why, the last time */
};
#define MF_PLACES (1u << 15)

#define MF_BULK (1u << 20)
#define MF_GROUPS_AT ((size_t)2 * MF_SLOTS * MF_SLOT)
#define MF_BULK_AT (MF_GROUPS_AT + (64u << 10))
#define MF_QUEUE_BYTES (MF_BULK_AT + MF_BULK)

/* A list of work requests, rung with one doorbell. */
#define MF_LIST (MF_SENDS / 2)
struct mf_list {
    struct ibv_send_wr work[MF_LIST];
    struct ibv_sge piece[MF_LIST];
    unsigned count;
};

struct mf_loan { /* of the caller's memory, to the device */
    struct ibv_mr *mr;
    uintptr_t from, to;
    uint64_t until; /* the last work that uses it */
};

struct mf_queue { /* of one connection, used for one operation at a time */
    struct mf_remote *remote;
    struct mf_pair pair;
    struct ibv_comp_channel *channel;
    struct ibv_mr *mr;
    uint8_t *buffer; /* messages received, messages to send, groups, bulk */
    uint64_t landing;
    uint32_t landing_key;
    uint32_t generation; /* of fork */
    uint64_t posted, done; /* work requests */
    uint64_t sent;         /* messages */
    uint64_t replies, taken;
    uint16_t order[MF_SLOTS]; /* slots with replies, in their order */
    uint16_t length[MF_SLOTS];
    bool armed;
    bool broken;    /* not to be used again */
    uint32_t usual; /* ns that one waits for the device */
    struct mf_loan loans[2];
    uint64_t lent; /* loans so far */
    struct mf_list batch; /* of changes that are not posted yet */
    uint64_t batch_bytes; /* of the landing area, by those that have no reply yet */
};
struct mf_remote *mf_remote_new(const char *device, char *why);
void mf_remote_free(struct mf_remote *remote);
struct mf_queue *mf_queue_new(struct mf_remote *remote, struct mf_address *address, char *why);
int mf_queue_connect(struct mf_queue *queue, const struct mf_welcome *welcome, char *why); /* an errno */
/* Whether bytes come over it: those of DATA's header. MF_TIMEOUT, MF_BROKEN: no; MF_CORRUPT: others. */
int mf_queue_test(struct mf_queue *queue, int fd, int64_t deadline);
void mf_queue_free(struct mf_queue *queue);

/* All below give MF_OK, MF_TIMEOUT, MF_BROKEN, or what the function answered. After an error the connection is not to
 * be used again. */
static inline void mf_list_begin(struct mf_list *list) { list->count = 0; } /* the rest need not be zero */
void mf_list_read(struct mf_list *list, struct mf_queue *queue, uint8_t *into, size_t length, uint64_t from,
                  uint32_t key);
void mf_list_write(struct mf_list *list, struct mf_queue *queue, const uint8_t *from, size_t length, uint64_t to,
                   uint32_t key);
void mf_list_message(struct mf_list *list, struct mf_queue *queue, const struct mf_request *request,
                     const struct iovec *payload, size_t count);
int mf_list_post(struct mf_list *list, struct mf_queue *queue, bool signal);
int mf_queue_wait(struct mf_queue *queue, int fd, uint64_t done, uint64_t replies, int64_t deadline);
/* The next reply; `room` bytes of what follows it go into `rest`. */
int mf_queue_reply(struct mf_queue *queue, int fd, struct mf_reply *reply, void *rest, size_t room, int64_t deadline);
int mf_queue_key(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint64_t offset, uint32_t *key);

/* verbs_flow.c */
#define MF_LEND (256u << 10)     /* bytes for which it takes less to register the caller's memory than to copy them */
#define MF_LEND_MOST (4u << 20)  /* bytes at once: the next ones are registered while these are under way */
struct mf_flow {
    struct mf_queue *queue;
    struct mf_stream *stream;
    int64_t deadline;
    uint8_t *data; /* of the caller */
    uint64_t length;
    uint64_t unit; /* bytes; MF_BULK is a multiple of it */
    bool reads;    /* `data` is what is written to */
    /* Adds the work for some bytes of data. They are `here`: in data itself, or in the queue's buffer. */
    int (*begin)(struct mf_flow *flow, struct mf_list *list, uint64_t from, uint64_t count, uint8_t *here);
    /* They have come, or are gone. False: once more, and not out of data itself. */
    bool (*finish)(struct mf_flow *flow, uint64_t from, uint64_t count, const uint8_t *here);
};
_Static_assert(MF_LEND_MOST >= MF_BULK, "a loan covers all that is under way");
int mf_flow_run(struct mf_flow *flow);
uint32_t mf_key_here(struct mf_queue *queue, const uint8_t *at);

/* verbs_get.c, verbs_put.c, verbs_region.c */
int mf_verbs_get(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint8_t space, const void *key,
                 uint32_t key_len, struct mf_op *found);
int mf_verbs_open(struct mf_queue *queue, uint64_t at, uint64_t size, const void *key, uint32_t key_len,
                  struct mf_op *found);
int mf_verbs_take(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_op *found, void *into,
                  void *meta);
int mf_verbs_get_many(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_wanted *wanted,
                      unsigned count);
/* Changes one behind the other: what they need lies in the landing area until their replies come. MF_WAIT: first these. */
int mf_verbs_put_next(struct mf_queue *queue, struct mf_request *request, const void *key, const void *value);
int mf_verbs_put_reply(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline,
                       struct mf_replaced *replaced);
int mf_verbs_change(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, struct mf_request *request,
                    struct mf_putting *put);
int mf_verbs_region(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint8_t verb, uint64_t offset,
                    uint8_t *data, uint64_t length, uint64_t b, uint64_t c, uint64_t *before);

/* Some calls of the library fail without saying why. */
static inline int mf_errno(void) { return errno ? errno : ENOMEM; }

/* verbs_serve.c: the function's side */
struct mf_end; /* of one connection */
struct mf_verbs_server;
struct mf_end *mf_end_new(struct mf_server *server, const char *device, const struct mf_address *peer,
                          struct mf_welcome *welcome, char *why);
void mf_end_bind(struct mf_end *end, struct connection *connection);
void mf_end_free(struct mf_end *end);
int mf_end_key(struct mf_end *end, uint64_t chunk, uint64_t *key); /* a status */
int mf_end_claim(struct mf_end *end);
/* All queue pairs are destroyed and nothing is registered when this returns; new clients are told why. */
void mf_verbs_close(struct mf_server *server, const char *why);
void mf_verbs_reopen(struct mf_server *server);
int mf_verbs_connections(struct mf_server *server);
/* Registers the chunks that no client has asked for yet, one with each call, while there are clients and it is open.
 * True: nobody does so yet, so the caller is to, until the other one is not MF_OK: MF_ABSENT, it is done; MF_BROKEN,
 * `why` says which limit does not let it. */
bool mf_verbs_ahead_begin(struct mf_server *server);
int mf_verbs_ahead(struct mf_server *server, char *why);
bool mf_verbs_make(struct mf_server *server);
void mf_verbs_free(struct mf_server *server);

#endif
