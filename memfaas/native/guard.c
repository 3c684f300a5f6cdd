/* SIGBUS inside a guarded access to a mapping becomes a jump to its way out.
 *
 * The owner takes memory back by truncating the file under our mapping; the next load or store there
 * raises SIGBUS. Anything else that raises SIGBUS goes to the handler that was installed before. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>

#include "memfaas.h"

_Thread_local struct mf_guard *mf_guard_top;
static struct sigaction before;

/* To the handler before ours. That one may hand it back, when it was itself put over an earlier one of
 * ours: then nobody wants it. */
static void pass_on(int number, siginfo_t *info, void *context) {
    static _Thread_local bool passing;
    bool nobody = passing || (!(before.sa_flags & SA_SIGINFO) &&
                              (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN));
    if (nobody) {
        signal(SIGBUS, SIG_DFL); /* a faulting access is repeated, and now ends the process as it should */
        if (info->si_code <= 0)
            raise(number);
        return;
    }
    passing = true;
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else
        before.sa_handler(number);
    passing = false;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    bool fault = info->si_code > 0; /* not sent by some process */
    struct mf_guard *guard = fault ? mf_guard_top : NULL;
    const char *address = info->si_addr;
    while (guard && !(address >= guard->low && address < guard->high))
        guard = guard->outer;
    if (guard)
        siglongjmp(guard->jump, 1);
    pass_on(number, info, context);
}

/* Again for each mapping: somebody (faulthandler, say) may have put a handler over ours. */
void mf_guard_install(void) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    struct sigaction now, action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    pthread_mutex_lock(&mutex);
    sigaction(SIGBUS, NULL, &now);
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_sigbus) {
        before = now;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, NULL);
    }
    pthread_mutex_unlock(&mutex);
}
