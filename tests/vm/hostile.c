/* A client over verbs that keeps no rules: whatever a device can be asked to send, from any queue pair to any address.
 * Called by ctypes; every function gives 0 or an errno if nothing else is said. */
#define _GNU_SOURCE
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "verbs.h"

#define ROOM (1u << 20)
#define RECEIVES 64
#define SENDS 512

struct client {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    union ibv_gid gid;
    struct ibv_port_attr port;
    int port_number, gid_index;
    uint8_t *buffer; /* to send from, and then to receive into */
};

void hostile_close(struct client *client) {
    if (client->qp)
        ibv_destroy_qp(client->qp);
    if (client->cq)
        ibv_destroy_cq(client->cq);
    if (client->mr)
        ibv_dereg_mr(client->mr);
    if (client->pd)
        ibv_dealloc_pd(client->pd);
    if (client->context)
        ibv_close_device(client->context);
    free(client->buffer);
    free(client);
}

struct client *hostile_open(const char *name, int port, int gid) {
    struct client *client = calloc(1, sizeof *client);
    struct ibv_device **all = ibv_get_device_list(NULL);
    for (int i = 0; all && all[i]; i++)
        if (strcmp(ibv_get_device_name(all[i]), name) == 0)
            client->context = ibv_open_device(all[i]);
    if (all)
        ibv_free_device_list(all);
    client->port_number = port;
    client->gid_index = gid;
    client->buffer = aligned_alloc(4096, 2 * ROOM);
    if (client->context && (client->pd = ibv_alloc_pd(client->context)) &&
        ibv_query_port(client->context, (uint8_t)port, &client->port) == 0 &&
        ibv_query_gid(client->context, (uint8_t)port, gid, &client->gid) == 0 &&
        (client->mr = ibv_reg_mr(client->pd, client->buffer, 2 * ROOM, IBV_ACCESS_LOCAL_WRITE)) &&
        (client->cq = ibv_create_cq(client->context, SENDS + RECEIVES, NULL, NULL, 0))) {
        struct ibv_qp_init_attr wanted = {
            .send_cq = client->cq,
            .recv_cq = client->cq,
            .cap = {.max_send_wr = SENDS, .max_recv_wr = RECEIVES, .max_send_sge = 1, .max_recv_sge = 1},
            .qp_type = IBV_QPT_RC,
        };
        client->qp = ibv_create_qp(client->pd, &wanted);
    }
    if (client->qp)
        return client;
    hostile_close(client);
    return NULL;
}

uint8_t *hostile_buffer(struct client *client) { return client->buffer; }

void hostile_address(struct client *client, struct mf_address *address) {
    *address = (struct mf_address){.version = MF_VERBS_VERSION,
                                   .qp = client->qp->qp_num,
                                   .lid = client->port.lid,
                                   .mtu = (uint8_t)client->port.active_mtu,
                                   .reads = 4};
    memcpy(address->gid, client->gid.raw, sizeof address->gid);
}

int hostile_connect(struct client *client, const struct mf_address *peer) {
    struct ibv_qp_attr to = {.qp_state = IBV_QPS_INIT, .port_num = (uint8_t)client->port_number};
    int error = ibv_modify_qp(client->qp, &to, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = peer->mtu < client->port.active_mtu ? peer->mtu : client->port.active_mtu,
        .dest_qp_num = peer->qp,
        .rq_psn = peer->psn,
        .max_dest_rd_atomic = 4,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = 1,
                    .port_num = (uint8_t)client->port_number,
                    .grh = {.sgid_index = (uint8_t)client->gid_index, .hop_limit = 64}},
    };
    memcpy(to.ah_attr.grh.dgid.raw, peer->gid, sizeof peer->gid);
    if (!error)
        error = ibv_modify_qp(client->qp, &to,
                              IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .timeout = 12, .retry_cnt = 3, .rnr_retry = 6, .max_rd_atomic = 4};
    return error ? error
                 : ibv_modify_qp(client->qp, &to,
                                 IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                     IBV_QP_MAX_QP_RD_ATOMIC);
}

int hostile_receive(struct client *client) {
    struct ibv_sge piece = {(uintptr_t)client->buffer + ROOM, 4096, client->mr->lkey};
    struct ibv_recv_wr work = {.wr_id = 1, .sg_list = &piece, .num_sge = 1}, *bad;
    return ibv_post_recv(client->qp, &work, &bad);
}

int hostile_post(struct client *client, int opcode, uint32_t length, uint64_t to, uint32_t key) {
    struct ibv_sge piece = {(uintptr_t)client->buffer, length, client->mr->lkey};
    struct ibv_send_wr work = {.sg_list = &piece,
                               .num_sge = 1,
                               .opcode = (enum ibv_wr_opcode)opcode,
                               .send_flags = IBV_SEND_SIGNALED},
                       *bad;
    if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
        work.wr.atomic.remote_addr = to;
        work.wr.atomic.rkey = key;
        work.wr.atomic.compare_add = 1;
    } else {
        work.wr.rdma.remote_addr = to;
        work.wr.rdma.rkey = key;
    }
    return ibv_post_send(client->qp, &work, &bad);
}

/* The status of the next completion (0: a good one) and whether it is of a receive; -1: none came in time. */
int hostile_wait(struct client *client, int milliseconds, int *received) {
    struct timespec nap = {0, 1000000};
    struct ibv_wc done;
    for (int i = 0; i <= milliseconds; i++) {
        if (ibv_poll_cq(client->cq, 1, &done) == 1) {
            *received = done.status == IBV_WC_SUCCESS && (done.opcode & IBV_WC_RECV);
            return (int)done.status;
        }
        nanosleep(&nap, NULL);
    }
    return -1;
}
