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

static void on_sigbus(int number, siginfo_t *info, void *context) {
    struct mf_guard *guard = mf_guard_top;
    const char *address = info->si_addr;
    while (guard && !(address >= guard->low && address < guard->high))
        guard = guard->outer;
    if (guard)
        siglongjmp(guard->jump, 1);
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else
        signal(SIGBUS, SIG_DFL); /* the access is repeated, and now ends the process as it should */
}

static void install(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
}

void mf_guard_install(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install);
}
