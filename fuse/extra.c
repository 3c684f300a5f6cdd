/* pyfuse3 knows neither locks nor fallocate, and keeps its table of handlers to itself. So we stand in front of the
 * function of libfuse that takes the table: this object is loaded, for all to see, before pyfuse3 is, whose call
 * then comes here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

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
        all.getlk = mf_extra.getlk;
        all.setlk = mf_extra.setlk;
        all.flock = mf_extra.flock;
        mf_extra_used = true;
    }
    return next(args, &all, sizeof all, userdata);
}
