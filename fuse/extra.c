/* pyfuse3 knows neither locks nor fallocate nor lseek, and keeps its table of handlers to itself. So we stand in front of the
 * function of libfuse that takes the table: this object is loaded, for all to see, before pyfuse3 is, whose call
 * then comes here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
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

/* --- the first exchange ------------------------------------------------------------------------------------
 *
 * Before each write the kernel asks for the attribute security.capability, to take it away: a request for each
 * request. It need not if the file system sees to that itself, but this libfuse does not know how to say so
 * (FUSE_HANDLE_KILLPRIV_V2, Linux 5.12). So the answer to the kernel's first request is completed on its way out. */

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
    int (*use)(struct fuse_session *, const struct fuse_custom_io *, int);
    *(void **)&next = dlsym(RTLD_NEXT, "fuse_session_mount");
    *(void **)&use = dlsym(RTLD_NEXT, "fuse_session_custom_io"); /* libfuse 3.13 */
    if (!next)
        return -1;
    int result = next(session, folder);
    if (result == 0 && use && mf_extra_used)
        use(session, &io, fuse_session_fd(session));
    return result;
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
                                      void *userdata) {
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
    struct fuse_lowlevel_ops all = {0};
    *(void **)&next = dlsym(RTLD_NEXT, "fuse_session_new");
    if (!next)
        return NULL;
    memcpy(&all, op, op_size < sizeof all ? op_size : sizeof all);
    if (mf_extra.fallocate && all.flush && all.release) {
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
        mf_extra_used = true;
    }
    return next(args, &all, sizeof all, userdata);
}
