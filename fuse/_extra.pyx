# cython: language_level=3
"""Hands the requests of extra.c to a Python object: see _extra.pyi."""

from libc.errno cimport EINTR, EIO
from libc.stdint cimport uint64_t

cdef extern from "extra.h":
    ctypedef void *fuse_req_t
    ctypedef uint64_t fuse_ino_t
    ctypedef long long off_t
    struct fuse_file_info:
        uint64_t fh
        uint64_t lock_owner
    struct flock_t "flock":
        short l_type
        short l_whence
        off_t l_start
        off_t l_len
        int l_pid
    struct mf_extra_t "mf_extra":
        void (*fallocate)(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length, fuse_file_info *fi) noexcept
        void (*lseek)(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, fuse_file_info *fi) noexcept
        void (*getlk)(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi, flock_t *lock) noexcept
        void (*setlk)(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi, flock_t *lock, int sleep) noexcept
        void (*flock)(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi, int op) noexcept
        void (*closed)(fuse_ino_t ino, uint64_t owner) noexcept
        void (*unlocked)(fuse_ino_t ino, uint64_t owner) noexcept
    mf_extra_t mf_extra
    bint mf_extra_used
    void mf_extra_reply_lseek(fuse_req_t req, off_t offset)
    bint mf_extra_fits()
    int FUSE_MAJOR_VERSION
    int FUSE_MINOR_VERSION
    const char *fuse_pkgversion()
    int fuse_reply_err(fuse_req_t req, int error)
    int fuse_reply_lock(fuse_req_t req, const flock_t *lock)
    void fuse_req_interrupt_func(fuse_req_t req, void (*func)(fuse_req_t req, void *data) noexcept, void *data)

cdef object handlers = None


cdef class LockRequest:
    cdef fuse_req_t req
    cdef readonly uint64_t ino, owner
    cdef readonly bint waits, interrupted
    cdef readonly int type
    cdef readonly long long start, length
    cdef readonly int pid

    def reply(self, int error):
        cdef fuse_req_t req = self.req
        if req is not NULL:
            self.req = NULL
            fuse_req_interrupt_func(req, NULL, NULL)
            fuse_reply_err(req, error)

    def reply_lock(self, int type, long long start, long long length, int pid):
        cdef flock_t lock
        lock.l_type = type
        lock.l_whence = 0
        lock.l_start = start
        lock.l_len = length
        lock.l_pid = pid
        if self.req is not NULL:
            fuse_reply_lock(self.req, &lock)
            self.req = NULL


cdef void on_interrupt(fuse_req_t req, void *data) noexcept with gil:
    (<LockRequest>data).interrupted = True


cdef LockRequest request_of(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi):
    cdef LockRequest request = LockRequest.__new__(LockRequest)
    request.req = req
    request.ino = ino
    request.owner = fi.lock_owner
    return request


cdef void on_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
                       fuse_file_info *fi) noexcept with gil:
    error = EIO
    try:
        error = handlers.fallocate(fi.fh, mode, offset, length)
    finally:
        fuse_reply_err(req, error)


cdef void on_lseek(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, fuse_file_info *fi) noexcept with gil:
    cdef long long found = -EIO
    try:
        found = handlers.lseek(fi.fh, offset, whence)
    finally:
        if found < 0:
            fuse_reply_err(req, -found)
        else:
            mf_extra_reply_lseek(req, found)


cdef void on_getlk(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi, flock_t *lock) noexcept with gil:
    cdef LockRequest request = request_of(req, ino, fi)
    request.type, request.start, request.length, request.pid = lock.l_type, lock.l_start, lock.l_len, lock.l_pid
    handlers.get_lock(request)


cdef void on_setlk(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi, flock_t *lock, int sleep) noexcept with gil:
    cdef LockRequest request = request_of(req, ino, fi)
    request.type, request.start, request.length, request.pid = lock.l_type, lock.l_start, lock.l_len, lock.l_pid
    request.waits = sleep
    if sleep:
        fuse_req_interrupt_func(req, on_interrupt, <void *>request)
    handlers.set_lock(request)


cdef void on_flock(fuse_req_t req, fuse_ino_t ino, fuse_file_info *fi, int op) noexcept with gil:
    cdef LockRequest request = request_of(req, ino, fi)
    request.type = op & ~4  # LOCK_NB
    request.waits = not op & 4
    if request.waits:
        fuse_req_interrupt_func(req, on_interrupt, <void *>request)
    handlers.set_flock(request)


cdef void on_closed(fuse_ino_t ino, uint64_t owner) noexcept with gil:
    handlers.closed(ino, owner)


cdef void on_unlocked(fuse_ino_t ino, uint64_t owner) noexcept with gil:
    handlers.unlocked(ino, owner)


def install(object wanted):
    global handlers
    handlers = wanted
    mf_extra.fallocate = on_fallocate
    mf_extra.lseek = on_lseek
    mf_extra.getlk = on_getlk
    mf_extra.setlk = on_setlk
    mf_extra.flock = on_flock
    mf_extra.closed = on_closed
    mf_extra.unlocked = on_unlocked


def used():
    return mf_extra_used


def fits():
    return mf_extra_fits()


def built_for():
    return f"{FUSE_MAJOR_VERSION}.{FUSE_MINOR_VERSION}"


def here():
    return fuse_pkgversion().decode()
