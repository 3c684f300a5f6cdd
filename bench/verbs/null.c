/* A verbs library without a device: everything that is posted is done at once, by a copy within this process.
 * What an operation takes over it is what software takes.
 *
 * Loaded first, it is the libibverbs.so.1 of its process (its soname), for memfaas and for bare.c, which is
 * compiled into it. Both ends of a connection must be in that process; keys are not looked at. */
#define _GNU_SOURCE
#include <errno.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#undef ibv_query_port /* in the header macros are in front of both */
#undef ibv_reg_mr

#define PAIRS 64u
#define ENTRIES 1024u
#define RECEIVES 256u

struct channel {
    struct ibv_comp_channel seen; /* its fd is where events are read */
    int write_fd;
};

struct queue {
    struct ibv_cq seen;
    _Atomic unsigned added, taken;
    bool armed;
    struct ibv_wc ring[ENTRIES];
};

struct pair {
    struct ibv_qp seen;
    struct queue *sends, *receives;
    unsigned peer; /* place in `pairs`; 0: not connected */
    unsigned posted, filled;
    struct {
        uint64_t id;
        void *at;
        size_t room;
    } receive[RECEIVES];
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* of all that two threads use */
static struct pair *pairs[PAIRS];

/* --- work ------------------------------------------------------------------------------------------- */

static void complete(struct queue *queue, const struct ibv_wc *done)
{
    unsigned at = atomic_load_explicit(&queue->added, memory_order_relaxed);
    queue->ring[at % ENTRIES] = *done;
    atomic_store_explicit(&queue->added, at + 1, memory_order_release);
    if (queue->armed && queue->seen.channel) {
        queue->armed = false;
        if (write(((struct channel *)queue->seen.channel)->write_fd, &queue, sizeof queue) != sizeof queue)
            abort(); /* a pipe that is full of events, or gone */
    }
}

static enum ibv_wc_status deliver(struct pair *to, const struct ibv_send_wr *work)
{
    if (!to || to->filled == to->posted)
        return IBV_WC_RNR_RETRY_EXC_ERR;
    unsigned at = to->filled++ % RECEIVES;
    size_t length = 0;
    for (int i = 0; i < work->num_sge; length += work->sg_list[i++].length) {
        if (work->sg_list[i].length > to->receive[at].room - length)
            return IBV_WC_REM_INV_REQ_ERR;
        memcpy((char *)to->receive[at].at + length, (void *)work->sg_list[i].addr, work->sg_list[i].length);
    }
    complete(to->receives, &(struct ibv_wc){.wr_id = to->receive[at].id,
                                            .status = IBV_WC_SUCCESS,
                                            .opcode = IBV_WC_RECV,
                                            .byte_len = (uint32_t)length,
                                            .qp_num = to->seen.qp_num});
    return IBV_WC_SUCCESS;
}

static void copy(const struct ibv_send_wr *work)
{
    char *far = (char *)work->wr.rdma.remote_addr;
    for (int i = 0; i < work->num_sge; far += work->sg_list[i++].length) {
        void *near = (void *)work->sg_list[i].addr;
        if (work->opcode == IBV_WR_RDMA_READ)
            memcpy(near, far, work->sg_list[i].length);
        else
            memcpy(far, near, work->sg_list[i].length);
    }
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *work, struct ibv_send_wr **bad)
{
    struct pair *pair = (struct pair *)qp;
    for (; work; work = work->next) {
        enum ibv_wc_status status = IBV_WC_SUCCESS;
        bool one_sided = work->opcode == IBV_WR_RDMA_READ || work->opcode == IBV_WR_RDMA_WRITE;
        if (!one_sided && work->opcode != IBV_WR_SEND) {
            *bad = work;
            return EOPNOTSUPP;
        }
        if (one_sided)
            copy(work);
        else {
            pthread_mutex_lock(&mutex);
            status = deliver(pairs[pair->peer], work);
            pthread_mutex_unlock(&mutex);
        }
        if (work->send_flags & IBV_SEND_SIGNALED || status != IBV_WC_SUCCESS) {
            enum ibv_wc_opcode did = work->opcode == IBV_WR_RDMA_READ    ? IBV_WC_RDMA_READ
                                     : work->opcode == IBV_WR_RDMA_WRITE ? IBV_WC_RDMA_WRITE
                                                                         : IBV_WC_SEND;
            pthread_mutex_lock(&mutex);
            complete(pair->sends,
                     &(struct ibv_wc){.wr_id = work->wr_id, .status = status, .opcode = did, .qp_num = qp->qp_num});
            pthread_mutex_unlock(&mutex);
        }
    }
    return 0;
}

static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *work, struct ibv_recv_wr **bad)
{
    struct pair *pair = (struct pair *)qp;
    int error = 0;
    pthread_mutex_lock(&mutex);
    for (; work && !error; work = work->next) {
        unsigned at = pair->posted % RECEIVES;
        if (work->num_sge != 1 || pair->posted - pair->filled == RECEIVES) {
            *bad = work;
            error = ENOMEM;
        } else {
            pair->receive[at].id = work->wr_id;
            pair->receive[at].at = (void *)work->sg_list->addr;
            pair->receive[at].room = work->sg_list->length;
            pair->posted++;
        }
    }
    pthread_mutex_unlock(&mutex);
    return error;
}

static int poll_cq(struct ibv_cq *cq, int room, struct ibv_wc *into)
{
    struct queue *queue = (struct queue *)cq;
    unsigned at = atomic_load_explicit(&queue->taken, memory_order_relaxed);
    int count = 0;
    while (count < room && at != atomic_load_explicit(&queue->added, memory_order_acquire))
        into[count++] = queue->ring[at++ % ENTRIES];
    atomic_store_explicit(&queue->taken, at, memory_order_relaxed);
    return count;
}

static int req_notify_cq(struct ibv_cq *cq, int solicited)
{
    (void)solicited;
    pthread_mutex_lock(&mutex);
    ((struct queue *)cq)->armed = true;
    pthread_mutex_unlock(&mutex);
    return 0;
}

/* --- the device ----------------------------------------------------------------------------------------- */

static struct ibv_device device = {.name = "null0"};

struct ibv_device **ibv_get_device_list(int *count)
{
    struct ibv_device **list = calloc(2, sizeof *list);
    list[0] = &device;
    *count = 1;
    return list;
}

void ibv_free_device_list(struct ibv_device **list) { free(list); }

const char *ibv_get_device_name(struct ibv_device *one) { return one->name; }

struct ibv_context *ibv_open_device(struct ibv_device *one)
{
    struct ibv_context *context = calloc(1, sizeof *context);
    context->device = one;
    context->cmd_fd = context->async_fd = -1;
    context->ops.post_send = post_send;
    context->ops.post_recv = post_recv;
    context->ops.poll_cq = poll_cq;
    context->ops.req_notify_cq = req_notify_cq;
    return context;
}

int ibv_close_device(struct ibv_context *context) { return free(context), 0; }

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *about)
{
    (void)context;
    *about = (struct ibv_device_attr){.phys_port_cnt = 1, .max_qp_rd_atom = 16, .max_qp_init_rd_atom = 16};
    return 0;
}

int ibv_query_port(struct ibv_context *context, uint8_t number, struct _compat_ibv_port_attr *compatible)
{
    struct ibv_port_attr *port = (void *)compatible; /* of those fields that have always been there */
    (void)context, (void)number;
    port->state = IBV_PORT_ACTIVE;
    port->max_mtu = port->active_mtu = IBV_MTU_4096;
    port->gid_tbl_len = 1;
    port->lid = 1;
    return 0;
}

int ibv_query_gid(struct ibv_context *context, uint8_t number, int index, union ibv_gid *gid)
{
    (void)context, (void)number, (void)index;
    memset(gid, 0, sizeof *gid);
    gid->raw[15] = 1;
    return 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    struct ibv_pd *pd = calloc(1, sizeof *pd);
    pd->context = context;
    return pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd) { return free(pd), 0; }

struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
    struct ibv_mr *mr = calloc(1, sizeof *mr);
    (void)access;
    *mr = (struct ibv_mr){.context = pd->context, .pd = pd, .addr = addr, .length = length, .lkey = 1, .rkey = 1};
    return mr;
}

int ibv_dereg_mr(struct ibv_mr *mr) { return free(mr), 0; }

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
    struct channel *channel = calloc(1, sizeof *channel);
    int ends[2];
    if (pipe(ends)) {
        free(channel);
        return NULL;
    }
    channel->seen.context = context;
    channel->seen.fd = ends[0];
    channel->write_fd = ends[1];
    return &channel->seen;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *seen)
{
    close(seen->fd);
    close(((struct channel *)seen)->write_fd);
    free(seen);
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **context)
{
    if (read(channel->fd, cq, sizeof *cq) != sizeof *cq)
        return -1;
    *context = (*cq)->cq_context;
    return 0;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned count) { (void)cq, (void)count; }

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int room, void *own, struct ibv_comp_channel *channel,
                             int vector)
{
    struct queue *queue = calloc(1, sizeof *queue);
    (void)room, (void)vector;
    queue->seen.context = context;
    queue->seen.channel = channel;
    queue->seen.cq_context = own;
    return &queue->seen;
}

int ibv_destroy_cq(struct ibv_cq *cq) { return free(cq), 0; }

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *wanted)
{
    struct pair *pair = calloc(1, sizeof *pair);
    unsigned number = 1;
    pthread_mutex_lock(&mutex);
    while (number < PAIRS && pairs[number])
        number++;
    if (number < PAIRS)
        pairs[number] = pair;
    pthread_mutex_unlock(&mutex);
    if (number == PAIRS) {
        free(pair);
        errno = ENOMEM;
        return NULL;
    }
    pair->seen.context = pd->context;
    pair->seen.qp_num = number;
    pair->sends = (struct queue *)wanted->send_cq;
    pair->receives = (struct queue *)wanted->recv_cq;
    return &pair->seen;
}

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *to, int mask)
{
    struct pair *pair = (struct pair *)qp;
    pthread_mutex_lock(&mutex);
    if (mask & IBV_QP_DEST_QPN)
        pair->peer = to->dest_qp_num < PAIRS ? to->dest_qp_num : 0;
    if (to->qp_state == IBV_QPS_ERR)
        for (; pair->filled != pair->posted; pair->filled++)
            complete(pair->receives, &(struct ibv_wc){.wr_id = pair->receive[pair->filled % RECEIVES].id,
                                                      .status = IBV_WC_WR_FLUSH_ERR,
                                                      .qp_num = qp->qp_num});
    pthread_mutex_unlock(&mutex);
    return 0;
}

int ibv_destroy_qp(struct ibv_qp *qp)
{
    pthread_mutex_lock(&mutex);
    pairs[qp->qp_num] = NULL;
    pthread_mutex_unlock(&mutex);
    free(qp);
    return 0;
}
