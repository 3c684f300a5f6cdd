/* libibverbs.so.1, loaded when it is first needed, and the device of it that this process uses. */
#define _GNU_SOURCE
#include <dirent.h>
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

static bool is_roce_v2(const char *device, int port, int index) {
    char path[256], type[32] = "";
    snprintf(path, sizeof path, "/sys/class/infiniband/%s/ports/%d/gid_attrs/types/%d", device, port, index);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    bool read = fgets(type, sizeof type, file) != NULL;
    fclose(file);
    return read && strncmp(type, "RoCE v2", 7) == 0;
}

static bool is_ipv4(const union ibv_gid *gid) {
    static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};
    return memcmp(gid->raw, prefix, sizeof prefix) == 0;
}

static bool is_zero(const union ibv_gid *gid) {
    static const union ibv_gid zero;
    return memcmp(gid, &zero, sizeof zero) == 0;
}

/* The best GID of a port: on Ethernet RoCE v2, which is routed, and rather by an IPv4 address. -1: none. */
static int choose_gid(struct mf_device *device, const char *name, const struct ibv_port_attr *port) {
    int best = -1;
    union ibv_gid gid;
    if (!device->ethernet)
        return 0;
    for (int i = 0; i < port->gid_tbl_len && i < 256; i++)
        if (is_roce_v2(name, device->port, i) && mf_verbs.query_gid(device->context, device->port, i, &gid) == 0) {
            if (is_ipv4(&gid))
                return i;
            if (best < 0)
                best = i;
        }
    return best;
}

static bool use_port(struct mf_device *device, const char *name, int number, int gid, char *why) {
    struct ibv_port_attr port;
    memset(&port, 0, sizeof port);
    device->port = (uint8_t)number;
    if (mf_verbs.query_port(device->context, device->port, &port) || port.state != IBV_PORT_ACTIVE) {
        snprintf(why, MF_WHY, "port %d of device %s is not active", number, name);
        return false;
    }
    device->ethernet = port.link_layer == IBV_LINK_LAYER_ETHERNET;
    device->lid = port.lid;
    device->mtu = port.active_mtu;
    if (gid < 0)
        gid = choose_gid(device, name, &port);
    if (gid < 0 || gid > 255 || mf_verbs.query_gid(device->context, device->port, gid, &device->gid)) {
        snprintf(why, MF_WHY, "port %d of device %s has no address of RoCE v2", number, name);
        return false;
    }
    device->gid_index = (uint8_t)gid;
    if (is_zero(&device->gid)) {
        snprintf(why, MF_WHY, "port %d of device %s has no address at index %d", number, name, gid);
        return false;
    }
    return true;
}

static bool use_device(struct mf_device *device, struct ibv_device *one, int port, int gid, char *why) {
    const char *name = mf_verbs.get_device_name(one);
    struct ibv_device_attr about;
    device->context = mf_verbs.open_device(one);
    if (!device->context) {
        snprintf(why, MF_WHY, "device %s cannot be opened: %s", name, strerror(errno));
        return false;
    }
    bool good = mf_verbs.query_device(device->context, &about) == 0;
    if (!good)
        snprintf(why, MF_WHY, "device %s cannot be asked what it can do", name);
    device->atomics = good && about.atomic_cap != IBV_ATOMIC_NONE;
    device->reads = good && about.max_qp_rd_atom < MOST_READS ? (uint8_t)about.max_qp_rd_atom : MOST_READS;
    device->reads_asked =
        good && about.max_qp_init_rd_atom < MOST_READS ? (uint8_t)about.max_qp_init_rd_atom : MOST_READS;
    bool found = false;
    for (int i = port ? port : 1; good && !found && i <= (port ? port : about.phys_port_cnt); i++)
        found = use_port(device, name, i, gid, why);
    if (found)
        snprintf(device->name, sizeof device->name, "%.60s:%d:%d", name, device->port, device->gid_index);
    else
        mf_verbs.close_device(device->context);
    return found;
}

/* The device by its name, or the first one with a port that works. */
static bool search(struct mf_device *device, const char *wanted, char *why) {
    char name[64] = "";
    int port = 0, gid = -1, count = 0;
    size_t length = strlen(wanted);
    if (length >= sizeof device->wanted || (length && sscanf(wanted, "%63[^:]:%d:%d", name, &port, &gid) < 1))
        return snprintf(why, MF_WHY, "%.60s is not device[:port[:gid index]]", wanted), false;
    struct ibv_device **all = mf_verbs.get_device_list(&count);
    snprintf(why, MF_WHY, all && count ? "there is no RDMA device of this name: %.60s" : "this node has no RDMA device",
             wanted);
    bool found = false;
    for (int i = 0; all && !found && i < count; i++)
        if (!wanted[0] || strcmp(name, mf_verbs.get_device_name(all[i])) == 0)
            found = use_device(device, all[i], port, gid, why);
    if (all)
        mf_verbs.free_device_list(all);
    if (found) {
        memcpy(device->wanted, wanted, length + 1);
        why[0] = 0;
    }
    return found;
}

/* One that was asked for by another name may have another port or address. */
static bool is_called(const struct mf_device *device, const char *wanted) {
    return strcmp(device->wanted, wanted) == 0 || strcmp(device->name, wanted) == 0;
}

struct mf_device *mf_device_open(const char *wanted, char *why) {
    pthread_mutex_lock(&mutex);
    struct mf_device *device = devices;
    for (; device; device = device->next)
        if (device->context && is_called(device, wanted))
            break;
    struct mf_device *fresh = !device && load(why) ? calloc(1, sizeof *fresh) : NULL;
    if (fresh && search(fresh, wanted, why)) {
        fresh->next = devices;
        device = devices = fresh;
    } else
        free(fresh);
    pthread_mutex_unlock(&mutex);
    return device;
}
