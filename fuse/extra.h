/* The requests that pyfuse3 has no handlers for. */
#ifndef MEMFAAS_FUSE_EXTRA_H
#define MEMFAAS_FUSE_EXTRA_H

#define FUSE_USE_VERSION 30
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdbool.h>

#if FUSE_MAJOR_VERSION != 3 || FUSE_MINOR_VERSION < 2
#error "memfaas needs libfuse 3.2 or newer, of major version 3: install libfuse3-dev"
#endif

/* What extra.pyx does about them. `closed` and `unlocked` come before pyfuse3's own flush and release. */
struct mf_extra {
    void (*fallocate)(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, struct fuse_file_info *fi);
    void (*lseek)(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, struct fuse_file_info *fi);
    void (*getlk)(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock);
    void (*setlk)(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock, int sleep);
    void (*flock)(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, int op);
    void (*closed)(fuse_ino_t ino, uint64_t owner);
    void (*unlocked)(fuse_ino_t ino, uint64_t owner);
};
extern struct mf_extra mf_extra;
void mf_extra_reply_lseek(fuse_req_t req, off_t offset);
extern bool mf_extra_used; /* a session was made with them */
/* Whether the structures of the libfuse that runs are those of the one that this was compiled for. */
bool mf_extra_fits(void);

#endif
