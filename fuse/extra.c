/* pyfuse3 knows neither locks nor fallocate nor lseek, and keeps its table of handlers to itself. So we stand in front
 * of the function of libfuse that takes the table: this object is loaded, for all to see, before pyfuse3 is, whose call
 * then comes here.
 *
 * What of libfuse's ABI this relies on:
 * - struct fuse_lowlevel_ops only grows at its end, and its size is passed. So of a larger one than ours nothing is
 *   known here, and then the table is left as it is.
 * - The bits of struct fuse_file_info (flock_release) moved in 3.15, and back in 3.17: mf_extra_fits.
 * - fuse_session_new is a macro since 3.17, for fuse_session_new_versioned.
 * - fuse_session_custom_io takes its structure's size since 3.17, under the same name. It is not called there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "extra.h"

struct mf_extra mf_extra;
bool mf_extra_used;
static void (*next_flush)(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);
static void (*next_release)(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi);

/* A close: the POSIX locks of the process are gone with it. */
static void flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    mf_extra.closed(ino, fi->lock_owner);
    next_flush(req, ino, fi);
}

/* The last close of an open file: its flock goes with it. */
static void release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi) {
    if (fi->flock_release)
        mf_extra.unlocked(ino, fi->lock_owner);
    next_release(req, ino, fi);
}

void mf_extra_reply_lseek(fuse_req_t req, off_t offset) {
#if FUSE_MINOR_VERSION >= 8
    fuse_reply_lseek(req, offset);
#else
    (void)offset;
    fuse_reply_err(req, ENOSYS);
#endif
}

bool mf_extra_fits(void) {
    int major, minor;
    if (sscanf(fuse_pkgversion(), "%d.%d", &major, &minor) != 2 || major != FUSE_MAJOR_VERSION)
        return false;
#define LAYOUT(minor) ((minor) < 15 ? 0 : (minor) < 17 ? 1 : 2)
    return LAYOUT(minor) == LAYOUT(FUSE_MINOR_VERSION);
}

/* --- the first exchange ------------------------------------------------------------------------------------
 *
 * Before each write the kernel asks for the attribute security.capability, to take it away: a request for each
 * request. It need not if the file system sees to that itself (FUSE_HANDLE_KILLPRIV_V2, Linux 5.12). libfuse knows
 * how to say so since 3.17. With older ones, the answer to the kernel's first request is completed on its way out. */

#if FUSE_MINOR_VERSION >= 17

static void (*next_init)(void *userdata, struct fuse_conn_info *conn);

static void init(void *userdata, struct fuse_conn_info *conn) {
    if (next_init)
        next_init(userdata, conn);
    fuse_set_feature_flag(conn, FUSE_CAP_HANDLE_KILLPRIV_V2);
}

#elif FUSE_MINOR_VERSION >= 13

#define INIT 26
#define INIT_FLAGS_AT (40 + 12) /* in the request, after the header */
#define INIT_REPLY_FLAGS_AT 12  /* in the reply, after the header */
#define HANDLE_KILLPRIV_V2 (1u << 28)

static uint64_t init_unique;
static bool may_handle_killpriv, greeted;

static ssize_t read_request(int fd, void *buffer, size_t length, void *userdata) {
    ssize_t got = read(fd, buffer, length);
    uint32_t opcode, flags;
    if (!greeted && got >= INIT_FLAGS_AT + 4) {
        memcpy(&opcode, (char *)buffer + 4, 4);
        memcpy(&flags, (char *)buffer + INIT_FLAGS_AT, 4);
        if (opcode == INIT) {
            memcpy(&init_unique, (char *)buffer + 8, 8);
            may_handle_killpriv = flags & HANDLE_KILLPRIV_V2;
        }
        greeted = true;
    }
    return got;
}

static ssize_t write_reply(int fd, struct iovec *pieces, int count, void *userdata) {
    uint64_t unique;
    uint32_t flags;
    if (init_unique && count == 2 && pieces[0].iov_len == 16 && pieces[1].iov_len >= INIT_REPLY_FLAGS_AT + 4) {
        memcpy(&unique, (char *)pieces[0].iov_base + 8, 8);
        if (unique == init_unique) {
            init_unique = 0;
            if (may_handle_killpriv) {
                memcpy(&flags, (char *)pieces[1].iov_base + INIT_REPLY_FLAGS_AT, 4);
                flags |= HANDLE_KILLPRIV_V2;
                memcpy((char *)pieces[1].iov_base + INIT_REPLY_FLAGS_AT, &flags, 4);
            }
        }
    }
    return writev(fd, pieces, count);
}

int fuse_session_mount(struct fuse_session *session, const char *folder) {
    static const struct fuse_custom_io io = {.writev = write_reply, .read = read_request};
    int (*next)(struct fuse_session *, const char *);
    *(void **)&next = dlsym(RTLD_NEXT, "fuse_session_mount");
    if (!next)
        return -1;
    int result = next(session, folder);
    if (result == 0 && mf_extra_used && fuse_session_custom_io(session, &io, fuse_session_fd(session)) != 0) {
        fuse_session_unmount(session);
        return -1;
    }
    return result;
}

#endif

/* --- the table ------------------------------------------------------------------------------------------------- */

static struct fuse_lowlevel_ops all;

/* The table that is to be used in place of pyfuse3's. */
static const struct fuse_lowlevel_ops *completed(const struct fuse_lowlevel_ops *op, size_t *size) {
    if (!op || *size > sizeof all || !mf_extra.fallocate)
        return op;
    memset(&all, 0, sizeof all);
    memcpy(&all, op, *size);
    if (!all.flush || !all.release)
        return op;
    next_flush = all.flush;
    next_release = all.release;
    all.flush = flush;
    all.release = release;
    all.fallocate = mf_extra.fallocate;
#if FUSE_MINOR_VERSION >= 8
    all.lseek = mf_extra.lseek;
#endif
    all.getlk = mf_extra.getlk;
    all.setlk = mf_extra.setlk;
    all.flock = mf_extra.flock;
#if FUSE_MINOR_VERSION >= 17
    next_init = all.init;
    all.init = init;
#endif
    mf_extra_used = true;
    *size = sizeof all;
    return &all;
}

#if FUSE_MINOR_VERSION >= 17

/* Under a name of its own here, for what libfuse declares differs in a `const`. */
struct fuse_session *new_session(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
                                 const struct libfuse_version *version,
                                 void *userdata) __asm__("fuse_session_new_versioned");

struct fuse_session *new_session(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
                                 const struct libfuse_version *version, void *userdata) {
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                 const struct libfuse_version *, void *);
    *(void **)&next = dlsym(RTLD_NEXT, "fuse_session_new_versioned");
    if (!next)
        return NULL;
    op = completed(op, &op_size);
    return next(args, op, op_size, version, userdata);
}

#else

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
                                      void *userdata) {
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
    *(void **)&next = dlsym(RTLD_NEXT, "fuse_session_new");
    if (!next)
        return NULL;
    op = completed(op, &op_size);
    return next(args, op, op_size, userdata);
}

#endif
