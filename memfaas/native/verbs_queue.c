/* A reliable connection between two devices, the same at both ends. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "verbs.h"

/* 4.096 us << TIMEOUT is how long a packet waits for its answer, about 70 ms. A dead peer shows after
 * RETRIES of that. (7 would be for ever on some devices.) */
#define TIMEOUT 14
#define RETRIES 6
#define NOT_READY 14 /* 1.28 ms; a peer that keeps the rules has always posted enough receives */

uint8_t *mf_buffer_make(size_t size) {
    uint8_t *buffer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        return NULL;
    madvise(buffer, size, MADV_DONTFORK);
    return buffer;
}

void mf_buffer_free(uint8_t *buffer, size_t size) {
    if (buffer)
        munmap(buffer, size);
}

int mf_pair_make(struct mf_pair *pair, struct mf_device *device, struct ibv_pd *pd, struct ibv_comp_channel *channel,
                 void *context) {
    pair->device = device;
    pair->cq = mf_verbs.create_cq(device->context, MF_SENDS + 2 * MF_SLOTS, context, channel, 0);
    if (!pair->cq)
        return mf_errno();
    struct ibv_qp_init_attr wanted = {
        .send_cq = pair->cq,
        .recv_cq = pair->cq,
        .cap = {.max_send_wr = MF_SENDS, .max_recv_wr = MF_SLOTS, .max_send_sge = 4, .max_recv_sge = 1,
                .max_inline_data = 128},
        .qp_type = IBV_QPT_RC,
    };
    pair->qp = mf_verbs.create_qp(pd, &wanted);
    if (!pair->qp) {
        wanted.cap.max_inline_data = 0; /* not every device has it */
        pair->qp = mf_verbs.create_qp(pd, &wanted);
    }
    if (!pair->qp || getrandom(&pair->psn, sizeof pair->psn, 0) != sizeof pair->psn) {
        int error = mf_errno();
        mf_pair_free(pair);
        return error;
    }
    pair->psn &= 0xffffff;
    pair->inline_max = wanted.cap.max_inline_data;
    return 0;
}

struct mf_address mf_pair_address(const struct mf_pair *pair) {
    const struct mf_device *device = pair->device;
    struct mf_address address = {.version = MF_VERBS_VERSION,
                                 .qp = pair->qp->qp_num,
                                 .psn = pair->psn,
                                 .lid = device->lid,
                                 .mtu = (uint8_t)device->mtu,
                                 .reads = device->reads};
    memcpy(address.gid, device->gid.raw, sizeof address.gid);
    return address;
}

bool mf_address_good(const struct mf_address *address) {
    return address->version == MF_VERBS_VERSION && address->qp <= 0xffffff && address->psn <= 0xffffff &&
           address->mtu >= IBV_MTU_256 && address->mtu <= IBV_MTU_4096;
}

int mf_pair_connect(struct mf_pair *pair, const struct mf_address *peer, unsigned access) {
    struct mf_device *device = pair->device;
    struct ibv_qp_attr to = {.qp_state = IBV_QPS_INIT, .port_num = device->port, .qp_access_flags = access};
    int error = mf_verbs.modify_qp(pair->qp, &to,
                                   IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    if (error)
        return error;
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = peer->mtu < device->mtu ? peer->mtu : device->mtu,
        .dest_qp_num = peer->qp,
        .rq_psn = peer->psn,
        .max_dest_rd_atomic = device->reads,
        .min_rnr_timer = NOT_READY,
        .ah_attr = {.is_global = device->ethernet || peer->lid == 0,
                    .dlid = peer->lid,
                    .port_num = device->port,
                    .grh = {.sgid_index = device->gid_index, .hop_limit = 64}},
    };
    memcpy(to.ah_attr.grh.dgid.raw, peer->gid, sizeof peer->gid);
    error = mf_verbs.modify_qp(pair->qp, &to,
                               IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                   IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    if (error)
        return error;
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS,
        .timeout = TIMEOUT,
        .retry_cnt = RETRIES,
        .rnr_retry = RETRIES,
        .sq_psn = pair->psn,
        .max_rd_atomic = peer->reads < device->reads_asked ? peer->reads : device->reads_asked,
    };
    return mf_verbs.modify_qp(pair->qp, &to,
                              IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                  IBV_QP_MAX_QP_RD_ATOMIC);
}

void mf_pair_free(struct mf_pair *pair) {
    if (pair->qp)
        mf_verbs.destroy_qp(pair->qp);
    if (pair->cq)
        mf_verbs.destroy_cq(pair->cq);
    pair->qp = NULL;
    pair->cq = NULL;
}
