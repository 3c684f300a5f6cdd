/* The floor under every operation over verbs: a queue pair connected to another of the same device, and
 * nothing between the clock and the device.
 *
 * READ and WRITE are posted and polled for. The exchange is what a put cannot do without: a WRITE, a SEND
 * behind it, and an answer by somebody who sleeps until the message is there; both ends block. Built by the
 * benchmark with the system's compiler, called by ctypes (without the GIL).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MESSAGE 64
#define RECEIVES 16

enum { READ, WRITE, EXCHANGE };

struct end {
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    uint8_t *memory; /* size bytes, then MESSAGE to send, then MESSAGE to receive */
};

struct bare {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct end near, far;
    size_t size;
    uint8_t port;
    pthread_t thread;
    int answering;
};

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int receive(struct bare *bare, struct end *end)
{
    struct ibv_sge piece = {(uintptr_t)end->memory + bare->size + MESSAGE, MESSAGE, end->mr->lkey};
    struct ibv_recv_wr work = {.sg_list = &piece, .num_sge = 1}, *bad;
    return ibv_post_recv(end->qp, &work, &bad);
}

static int make_end(struct bare *bare, struct end *end)
{
    size_t room = bare->size + 2 * MESSAGE;
    end->memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (end->memory == MAP_FAILED)
        return end->memory = NULL, errno;
    end->mr = ibv_reg_mr(bare->pd, end->memory, room,
                         IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE);
    if (!end->mr || !(end->channel = ibv_create_comp_channel(bare->context)) ||
        !(end->cq = ibv_create_cq(bare->context, 64, NULL, end->channel, 0)))
        return errno;
    struct ibv_qp_init_attr wanted = {
        .send_cq = end->cq,
        .recv_cq = end->cq,
        .cap = {.max_send_wr = 64, .max_recv_wr = RECEIVES, .max_send_sge = 1, .max_recv_sge = 1,
                .max_inline_data = MESSAGE},
        .qp_type = IBV_QPT_RC,
    };
    return (end->qp = ibv_create_qp(bare->pd, &wanted)) ? 0 : errno;
}

static int connect_end(struct bare *bare, struct end *end, struct end *peer, int gid)
{
    struct ibv_port_attr port;
    union ibv_gid address;
    int error = ibv_query_port(bare->context, bare->port, &port);
    if (error || (error = ibv_query_gid(bare->context, bare->port, gid, &address)))
        return error;
    struct ibv_qp_attr to = {.qp_state = IBV_QPS_INIT,
                             .port_num = bare->port,
                             .qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE};
    error = ibv_modify_qp(end->qp, &to, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    if (error)
        return error;
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = port.active_mtu,
        .dest_qp_num = peer->qp->qp_num,
        .max_dest_rd_atomic = 1,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = port.link_layer == IBV_LINK_LAYER_ETHERNET || port.lid == 0,
                    .dlid = port.lid,
                    .port_num = bare->port,
                    .grh = {.sgid_index = (uint8_t)gid, .hop_limit = 64, .dgid = address}},
    };
    error = ibv_modify_qp(end->qp, &to,
                          IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                              IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    if (error)
        return error;
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 6, .rnr_retry = 6, .max_rd_atomic = 1};
    error = ibv_modify_qp(end->qp, &to,
                          IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                              IBV_QP_MAX_QP_RD_ATOMIC);
    for (int i = 0; !error && i < RECEIVES; i++)
        error = receive(bare, end);
    return error;
}

static int send_message(struct bare *bare, struct end *end)
{
    struct ibv_sge piece = {(uintptr_t)end->memory + bare->size, MESSAGE, end->mr->lkey};
    struct ibv_send_wr work = {.sg_list = &piece,
                               .num_sge = 1,
                               .opcode = IBV_WR_SEND,
                               .send_flags = IBV_SEND_INLINE | IBV_SEND_SIGNALED},
                       *bad;
    return ibv_post_send(end->qp, &work, &bad);
}

/* Sleeps until a message was received; takes the completions of what was sent on the way. */
static int wait_for_message(struct end *end)
{
    struct ibv_wc done;
    for (;;) {
        int n;
        while ((n = ibv_poll_cq(end->cq, 1, &done)) > 0) {
            if (done.status != IBV_WC_SUCCESS)
                return EIO;
            if (done.opcode == IBV_WC_RECV)
                return 0;
        }
        if (n < 0)
            return EIO;
        struct ibv_cq *cq;
        void *context;
        if (ibv_req_notify_cq(end->cq, 0))
            return EIO;
        if ((n = ibv_poll_cq(end->cq, 1, &done)) != 0) { /* it came just before */
            if (n < 0 || done.status != IBV_WC_SUCCESS)
                return EIO;
            if (done.opcode == IBV_WC_RECV)
                return 0;
            continue;
        }
        if (ibv_get_cq_event(end->channel, &cq, &context))
            return EIO;
        ibv_ack_cq_events(cq, 1);
    }
}

static void *answer(void *of)
{
    struct bare *bare = of;
    while (wait_for_message(&bare->far) == 0)
        if (receive(bare, &bare->far) || send_message(bare, &bare->far))
            break;
    return NULL;
}

void bare_close(struct bare *bare)
{
    struct end *ends[] = {&bare->near, &bare->far};
    if (bare->answering) { /* its receives are flushed, which wakes it */
        struct ibv_qp_attr to = {.qp_state = IBV_QPS_ERR};
        ibv_modify_qp(bare->far.qp, &to, IBV_QP_STATE);
        pthread_join(bare->thread, NULL);
    }
    for (int i = 0; i < 2; i++) {
        if (ends[i]->qp)
            ibv_destroy_qp(ends[i]->qp);
        if (ends[i]->cq)
            ibv_destroy_cq(ends[i]->cq);
        if (ends[i]->channel)
            ibv_destroy_comp_channel(ends[i]->channel);
        if (ends[i]->mr)
            ibv_dereg_mr(ends[i]->mr);
        if (ends[i]->memory)
            munmap(ends[i]->memory, bare->size + 2 * MESSAGE);
    }
    if (bare->pd)
        ibv_dealloc_pd(bare->pd);
    if (bare->context)
        ibv_close_device(bare->context);
    free(bare);
}

/* NULL: `*error` says why. */
struct bare *bare_open(const char *name, int port, int gid, size_t size, int *error)
{
    struct bare *bare = calloc(1, sizeof *bare);
    int count = 0;
    struct ibv_device **all = ibv_get_device_list(&count);
    bare->size = size;
    bare->port = (uint8_t)port;
    for (int i = 0; all && i < count; i++)
        if (strcmp(ibv_get_device_name(all[i]), name) == 0)
            bare->context = ibv_open_device(all[i]);
    if (all)
        ibv_free_device_list(all);
    *error = ENODEV;
    if (bare->context && (bare->pd = ibv_alloc_pd(bare->context)) && !(*error = make_end(bare, &bare->near)) &&
        !(*error = make_end(bare, &bare->far)) && !(*error = connect_end(bare, &bare->far, &bare->near, gid)) &&
        !(*error = connect_end(bare, &bare->near, &bare->far, gid)) &&
        !(*error = pthread_create(&bare->thread, NULL, answer, bare))) {
        bare->answering = 1;
        return bare;
    }
    bare_close(bare);
    return NULL;
}

static int one(struct bare *bare, int op, size_t size)
{
    struct end *near = &bare->near;
    struct ibv_sge piece = {(uintptr_t)near->memory, (uint32_t)size, near->mr->lkey};
    struct ibv_send_wr work = {.sg_list = &piece,
                               .num_sge = 1,
                               .opcode = op == READ ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE,
                               .send_flags = op == EXCHANGE ? 0 : IBV_SEND_SIGNALED,
                               .wr.rdma = {(uintptr_t)bare->far.memory, bare->far.mr->rkey}},
                       *bad;
    struct ibv_wc done;
    int n, error = ibv_post_send(near->qp, &work, &bad);
    if (error)
        return error;
    if (op == EXCHANGE) {
        if ((error = send_message(bare, near)) || (error = wait_for_message(near)))
            return error;
        return receive(bare, near);
    }
    while ((n = ibv_poll_cq(near->cq, 1, &done)) == 0)
        ;
    return n < 0 || done.status != IBV_WC_SUCCESS ? EIO : 0;
}

/* 0 or an errno. `times`: nanoseconds of each. */
int bare_run(struct bare *bare, int op, size_t size, int count, int64_t *times)
{
    for (int i = 0; i < count; i++) {
        int64_t start = now();
        int error = one(bare, op, size);
        if (error)
            return error;
        times[i] = now() - start;
    }
    return 0;
}
