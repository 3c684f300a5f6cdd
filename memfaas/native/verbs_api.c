/* libibverbs.so.1, loaded when it is first needed, and the device of it that this process uses. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "verbs.h"

#define MOST_READS 16

struct mf_verbs_api mf_verbs;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct mf_device *devices; /* that were opened */

static const struct {
    const char *name;
    size_t at;
} symbols[] = {
#define SYMBOL(name) {"ibv_" #name, offsetof(struct mf_verbs_api, name)}
    SYMBOL(get_device_list),
    SYMBOL(free_device_list),
    SYMBOL(get_device_name),
    SYMBOL(open_device),
    SYMBOL(close_device),
    SYMBOL(query_device),
    SYMBOL(query_port),
    SYMBOL(query_gid),
    SYMBOL(alloc_pd),
    SYMBOL(dealloc_pd),
    SYMBOL(reg_mr),
    SYMBOL(dereg_mr),
    SYMBOL(create_comp_channel),
    SYMBOL(destroy_comp_channel),
    SYMBOL(create_cq),
    SYMBOL(destroy_cq),
    SYMBOL(get_cq_event),
    SYMBOL(ack_cq_events),
    SYMBOL(create_qp),
    SYMBOL(modify_qp),
    SYMBOL(destroy_qp),
};

static bool load(char *why) {
    static bool loaded;
    if (loaded)
        return true;
    void *library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why, MF_WHY, "libibverbs.so.1 is not installed; it is in the package libibverbs1 (or rdma-core)");
        return false;
    }
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *symbol = dlsym(library, symbols[i].name);
        if (!symbol) {
            snprintf(why, MF_WHY, "libibverbs.so.1 has no %s: it is too old", symbols[i].name);
            return false;
        }
        memcpy((char *)&mf_verbs + symbols[i].at, &symbol, sizeof symbol);
    }
    /* Of older libraries nobody knows. */
    enum ibv_fork_status (*fork_status)(void) = NULL;
    void *symbol = dlsym(library, "ibv_is_fork_initialized");
    memcpy(&fork_status, &symbol, sizeof symbol);
    mf_verbs.fork_safe = fork_status && fork_status() == IBV_FORK_UNNEEDED;
    return loaded = true;
}

/* A forked child cannot use the parent's device. (What it inherits of the provider's mappings still keeps that
 * open, with the parent's queues, until the child ends, too.) */
static void forget(void) {
    for (struct mf_device *one = devices; one; one = one->next)
        if (one->context) {
            close(one->context->cmd_fd);
            close(one->context->async_fd);
            one->context = NULL; /* not freed: the parent's queues, which are copied here too, point to it */
        }
    pthread_mutex_init(&mutex, NULL);
}
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget); }

static bool is_zero(const union ibv_gid *gid) {
    static const union ibv_gid zero;
    return memcmp(gid, &zero, sizeof zero) == 0;
}

static bool use_port(struct mf_device *device, const char *name, int number, int gid, char *why) {
    struct ibv_port_attr port;
    memset(&port, 0, sizeof port);
    if (mf_verbs.query_port(device->context, (uint8_t)number, &port) || port.state != IBV_PORT_ACTIVE) {
        snprintf(why, MF_WHY, "port %d of device %s is not active", number, name);
        return false;
    }
    if (mf_verbs.query_gid(device->context, (uint8_t)number, gid, &device->gid) || is_zero(&device->gid)) {
        snprintf(why, MF_WHY, "port %d of device %s has no address at index %d", number, name, gid);
        return false;
    }
    device->port = (uint8_t)number;
    device->gid_index = (uint8_t)gid;
    device->ethernet = port.link_layer == IBV_LINK_LAYER_ETHERNET;
    device->lid = port.lid;
    device->mtu = port.active_mtu;
    return true;
}

static bool use_device(struct mf_device *device, struct ibv_device *one, const char *name, int port, int gid,
                       char *why) {
    struct ibv_device_attr about;
    device->context = mf_verbs.open_device(one);
    if (!device->context) {
        snprintf(why, MF_WHY, "device %s cannot be opened: %s", name, strerror(errno));
        return false;
    }
    bool good = mf_verbs.query_device(device->context, &about) == 0;
    if (!good)
        snprintf(why, MF_WHY, "device %s cannot be asked what it can do", name);
    if (!good || !use_port(device, name, port, gid, why)) {
        mf_verbs.close_device(device->context);
        return false;
    }
    device->atomics = about.atomic_cap != IBV_ATOMIC_NONE;
    device->reads = about.max_qp_rd_atom < MOST_READS ? (uint8_t)about.max_qp_rd_atom : MOST_READS;
    device->reads_asked = about.max_qp_init_rd_atom < MOST_READS ? (uint8_t)about.max_qp_init_rd_atom : MOST_READS;
    return true;
}

static bool find(struct mf_device *device, const char *wanted, char *why) {
    char name[64];
    int port, gid, count = 0;
    if (strlen(wanted) >= sizeof device->name || sscanf(wanted, "%63[^:]:%d:%d", name, &port, &gid) != 3 || port < 1 ||
        port > 255 || gid < 0 || gid > 255) {
        snprintf(why, MF_WHY, "%.60s is not device:port:gid index", wanted);
        return false;
    }
    struct ibv_device **all = mf_verbs.get_device_list(&count);
    bool found = false, there = false;
    for (int i = 0; all && !there && i < count; i++)
        if (strcmp(name, mf_verbs.get_device_name(all[i])) == 0) {
            there = true;
            found = use_device(device, all[i], name, port, gid, why);
        }
    if (all)
        mf_verbs.free_device_list(all);
    if (!there)
        snprintf(why, MF_WHY, "this node has no RDMA device %s", name);
    if (found)
        memcpy(device->name, wanted, strlen(wanted) + 1);
    return found;
}

struct mf_device *mf_device_open(const char *wanted, char *why) {
    pthread_mutex_lock(&mutex);
    struct mf_device *device = devices;
    while (device && (!device->context || strcmp(device->name, wanted) != 0))
        device = device->next;
    struct mf_device *fresh = !device && load(why) ? calloc(1, sizeof *fresh) : NULL;
    if (fresh && find(fresh, wanted, why)) {
        fresh->next = devices;
        device = devices = fresh;
    } else
        free(fresh);
    pthread_mutex_unlock(&mutex);
    return device;
}
