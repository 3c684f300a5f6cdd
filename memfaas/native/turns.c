/* Turns at what several threads need: see serve.h. */
#include <time.h>

#include "serve.h"

void mf_turns_make(struct mf_turns *turns) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&turns->mutex, NULL);
    pthread_cond_init(&turns->quiet, &attributes);
}

void mf_turns_enter(struct mf_turns *turns) {
    atomic_fetch_add(&turns->wanted, 1);
    pthread_mutex_lock(&turns->mutex);
}

void mf_turns_leave(struct mf_turns *turns) {
    if (atomic_fetch_sub(&turns->wanted, 1) == 1)
        pthread_cond_broadcast(&turns->quiet);
    pthread_mutex_unlock(&turns->mutex);
}

void mf_turns_enter_last(struct mf_turns *turns, int64_t patience) {
    pthread_mutex_lock(&turns->mutex);
    if (!atomic_load(&turns->wanted))
        return;
    int64_t until = mf_now() + patience;
    struct timespec time = {until / 1000000000, until % 1000000000};
    int error = 0;
    while (atomic_load(&turns->wanted) && !error)
        error = pthread_cond_timedwait(&turns->quiet, &turns->mutex, &time);
}

void mf_turns_leave_last(struct mf_turns *turns) { pthread_mutex_unlock(&turns->mutex); }
